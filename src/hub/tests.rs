//! A small server on loopback that speaks the Hub's API, with the troubles that a real one has.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::json;
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::*;
use crate::config::hex;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What a request is answered with, instead of the truth.
#[derive(Clone)]
enum Trouble {
    /// A status, with headers.
    Status(u16, &'static str),
    /// The connection is closed without a word.
    Silence,
    /// So many bytes of the body, then the connection is cut.
    Cut(usize),
    /// Another body of the same length.
    Flipped,
}

#[derive(Default)]
struct Told {
    /// By `METHOD name`: each request takes one off.
    troubles: BTreeMap<String, VecDeque<Trouble>>,
    /// The requests: method, path, range, token.
    heard: Vec<(String, String, Option<String>, Option<String>)>,
}

/// The Hub, and the other host that large files lie on.
struct Server {
    endpoint: String,
    told: Arc<Mutex<Told>>,
}

fn files() -> BTreeMap<&'static str, Vec<u8>> {
    let large = (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let index =
        json!({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}});
    BTreeMap::from([
        ("config.json", b"{}".to_vec()),
        ("tokenizer.json", b"{\"a\": 1}".to_vec()),
        ("tokenizer_config.json", b"{}\n".to_vec()),
        ("model.safetensors.index.json", index.to_string().into_bytes()),
        ("model-00001-of-00002.safetensors", large),
        ("model-00002-of-00002.safetensors", vec![7; 1000]),
        ("training_args.bin", vec![1; 10]),
    ])
}

impl Server {
    fn start() -> Self {
        let told = Arc::new(Mutex::new(Told::default()));
        let [hub, store] = [(); 2].map(|()| TcpListener::bind(("127.0.0.1", 0)).unwrap());
        // Two names of one machine are two hosts to a client.
        let address = |listener: &TcpListener, host| format!("http://{host}:{}", listener.local_addr().unwrap().port());
        let (endpoint, elsewhere) = (address(&hub, "127.0.0.1"), address(&store, "localhost"));
        for listener in [hub, store] {
            let (told, elsewhere) = (told.clone(), elsewhere.clone());
            thread::spawn(move || {
                for stream in listener.incoming() {
                    let (told, elsewhere) = (told.clone(), elsewhere.clone());
                    thread::spawn(move || serve(stream.unwrap(), &told, &elsewhere));
                }
            });
        }
        Self { endpoint, told }
    }

    fn trouble(&self, what: &str, troubles: &[Trouble]) {
        self.told.lock().unwrap().troubles.insert(what.into(), troubles.iter().cloned().collect());
    }

    /// What was asked for since the last time, of paths that end so.
    fn heard(&self, of: &str) -> Vec<String> {
        let heard = std::mem::take(&mut self.told.lock().unwrap().heard);
        let line = |(method, path, range, token): &(String, String, Option<String>, Option<String>)| {
            let range = range.as_ref().map(|range| format!(" {range}")).unwrap_or_default();
            format!("{method} {path}{range}{}", if token.is_some() { " with token" } else { "" })
        };
        heard.iter().filter(|(_, path, ..)| path.ends_with(of)).map(line).collect()
    }

    fn hub(&self, cache: &Path, token: Option<&str>) -> Hub {
        let client = Client::new(&self.endpoint, token.map(str::to_owned), true, Duration::from_millis(1));
        Hub { cache: cache.into(), client: Some(client) }
    }
}

fn serve(stream: TcpStream, told: &Mutex<Told>, elsewhere: &str) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    while let Some(Ok(first)) = lines.next() {
        let mut words = first.split(' ').map(str::to_owned);
        let (method, path) = (words.next().unwrap(), words.next().unwrap());
        let mut headers = BTreeMap::new();
        for line in lines.by_ref().map_while(Result::ok).take_while(|line| !line.is_empty()) {
            let (name, value) = line.split_once(": ").unwrap();
            headers.insert(name.to_ascii_lowercase(), value.to_owned());
        }
        if !answer(&stream, &method, &path, &headers, told, elsewhere) {
            return;
        }
    }
}

/// Whether the connection stays.
fn answer(
    mut stream: &TcpStream,
    method: &str,
    path: &str,
    headers: &BTreeMap<String, String>,
    told: &Mutex<Told>,
    elsewhere: &str,
) -> bool {
    let (range, token) = (headers.get("range").cloned(), headers.get("authorization").cloned());
    let name = path.rsplit('/').next().unwrap().to_owned();
    let trouble = {
        let mut told = told.lock().unwrap();
        told.heard.push((method.into(), path.into(), range.clone(), token));
        told.troubles.get_mut(&format!("{method} {name}")).and_then(VecDeque::pop_front)
    };
    let mut send = |status: u16, more: &str, body: &[u8]| {
        let head = format!("HTTP/1.1 {status} -\r\nContent-Length: {}\r\n{more}\r\n", body.len());
        stream.write_all(head.as_bytes()).unwrap();
        let _ = stream.write_all(if method == "HEAD" { b"" } else { body });
        true
    };
    match trouble {
        Some(Trouble::Status(status, more)) => return send(status, more, b""),
        Some(Trouble::Silence) => return false,
        _ => {}
    }
    if let Some(asked) = path.strip_prefix("/api/models/") {
        let (repository, revision) = asked.split_once("/revision/").unwrap();
        if repository != "org/name" {
            return send(401, "X-Error-Code: RepoNotFound\r\nX-Error-Message: Repository not found\r\n", b"");
        }
        if !["main", COMMIT, "refs%2Fpr%2F1"].contains(&revision) {
            return send(404, "X-Error-Code: RevisionNotFound\r\n", b"");
        }
        let siblings: Vec<_> = files().keys().map(|name| json!({"rfilename": name})).collect();
        return send(200, "", json!({"sha": COMMIT, "siblings": siblings}).to_string().as_bytes());
    }
    let Some(mut body) = files().get(name.as_str()).cloned() else { return send(404, "", b"") };
    let is_large = name.ends_with(".safetensors");
    let etag = match is_large {
        true => hex(&Sha256::digest(&body)),
        false => hex(&Sha1::new_with_prefix(format!("blob {}\0", body.len())).chain_update(&body).finalize()),
    };
    if is_large && path.starts_with("/org/") {
        // As the Hub does: what it knows of the file, and the way to it.
        let more = format!(
            "X-Repo-Commit: {COMMIT}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {}\r\nLocation: {elsewhere}/store/{name}\r\n",
            body.len()
        );
        return send(302, &more, b"");
    }
    if let Some(Trouble::Flipped) = trouble {
        body[0] ^= 1;
    }
    let (mut status, mut more) = (200, format!("X-Repo-Commit: {COMMIT}\r\nETag: W/\"{etag}\"\r\n"));
    if let Some(range) = range {
        let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
        more += &format!("Content-Range: bytes {first}-{last}/{}\r\n", body.len());
        body = body[first..=last].to_vec();
        status = 206;
    }
    if let Some(Trouble::Cut(bytes)) = trouble {
        let head = format!("HTTP/1.1 {status} -\r\nContent-Length: {}\r\n{more}\r\n", body.len());
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&body[..bytes]).unwrap();
        return false;
    }
    send(status, &more, &body)
}

fn fetched(folder: &Path) {
    for (name, body) in files() {
        assert_eq!(fs::read(folder.join(name)).ok(), (name != "training_args.bin").then_some(body), "{name}");
    }
}

#[test]
fn a_checkpoint_is_fetched_once_and_lies_as_python_puts_it() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path(), Some("hf_secret"));
    let folder = hub.folder("org/name", "main", Scope::Description).unwrap();
    assert!(!folder.join("model.safetensors.index.json").exists());
    assert_eq!(hub.folder("org/name", "main", Scope::Whole).unwrap(), folder);
    fetched(&folder);
    let place = cache.path().join("models--org--name");
    assert_eq!(folder, place.join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(place.join("refs/main")).unwrap(), COMMIT);
    let link = fs::read_link(folder.join("config.json")).unwrap();
    assert_eq!(link, Path::new("../../blobs/9e26dfeeb6e641a33dae4961196235bdb965b21b"), "git's hash of {{}}");
    // The token goes to the Hub, and to nobody else.
    let heard = server.heard("");
    assert!(heard.iter().all(|line| line.contains("/store/") != line.ends_with(" with token")), "{heard:#?}");
    assert!(heard.iter().any(|line| line.contains("GET /store/")), "{heard:#?}");

    assert_eq!(hub.folder("org/name", "main", Scope::Whole).unwrap(), folder);
    assert_eq!(server.heard(""), ["GET /api/models/org/name/revision/main with token"]);
    assert_eq!(hub.folder("org/name", COMMIT, Scope::Whole).unwrap(), folder);
    assert!(server.heard("").is_empty(), "a commit does not change");
    assert_eq!(hub.folder("org/name", "refs/pr/1", Scope::Whole).unwrap(), folder);

    let offline = Hub { cache: cache.path().into(), client: None };
    assert_eq!(offline.folder("org/name", "main", Scope::Whole).unwrap(), folder);
    fs::remove_file(folder.join("model-00002-of-00002.safetensors")).unwrap();
    let error = offline.folder("org/name", "main", Scope::Whole).unwrap_err();
    assert!(error.to_string().starts_with("hf:org/name@main is not in "), "{error}");
    assert_eq!(hub.folder("org/name", COMMIT, Scope::Whole).unwrap(), folder);
    assert!(
        server.heard("").iter().all(|line| line.starts_with("HEAD") || line.contains("/api/")),
        "its blob is there"
    );
}

#[test]
fn a_hub_that_is_busy_or_breaks_off_is_asked_again_for_the_rest() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let busy = [Trouble::Status(429, "Retry-After: 0\r\n"), Trouble::Silence, Trouble::Status(503, "")];
    server.trouble("GET main", &busy);
    server.trouble("HEAD config.json", &busy);
    server.trouble("GET model-00001-of-00002.safetensors", &[]);
    let large = "model-00001-of-00002.safetensors";
    // The Hub's own answer, a redirect, takes the first of them.
    server.trouble(&format!("GET {large}"), &[Trouble::Cut(0), Trouble::Cut(1_000_000), Trouble::Cut(5)]);
    let hub = server.hub(cache.path(), None);
    fetched(&hub.folder("org/name", "main", Scope::Whole).unwrap());
    let heard = server.heard(large);
    let pieces: Vec<_> = heard.iter().filter(|line| line.starts_with("GET /store/")).collect();
    assert!(pieces.len() >= 2 && pieces.iter().any(|line| line.ends_with(" bytes=1000000-2999999")), "{heard:#?}");
}

#[test]
fn what_an_earlier_process_left_is_gone_on_with_or_thrown_away() {
    let server = Server::start();
    let large = files()["model-00001-of-00002.safetensors"].clone();
    let mut other = large[..700].to_vec();
    other[3] ^= 1;
    for (left, resumed) in
        [(large[..700].to_vec(), true), (other, false), (vec![0; 4_000_000], false), (large.clone(), true)]
    {
        let cache = tempfile::tempdir().unwrap();
        let blobs = cache.path().join("models--org--name/blobs");
        fs::create_dir_all(&blobs).unwrap();
        let blob = blobs.join(hex(&Sha256::digest(&large)));
        fs::write(blob.with_extension("incomplete"), &left).unwrap();
        fetched(&server.hub(cache.path(), None).folder("org/name", "main", Scope::Whole).unwrap());
        assert!(!blob.with_extension("incomplete").exists());
        let whole = server.heard("model-00001-of-00002.safetensors").iter().any(|line| line.contains(" bytes=0-"));
        assert_eq!(whole, !resumed, "{} bytes were left", left.len());
    }
}

#[test]
fn what_cannot_be_had_is_said_with_what_to_do() {
    let (server, cache) = (Server::start(), tempfile::tempdir().unwrap());
    let says = |repository: &str, revision: &str, token: Option<&str>| {
        let error = server.hub(cache.path(), token).folder(repository, revision, Scope::Whole).unwrap_err();
        let users = error.chain().any(|cause| cause.is::<crate::error::UserError>());
        (format!("{error:#}"), users)
    };
    let has = |(error, users): (String, bool), of_the_user: bool, parts: &[&str]| {
        assert!(parts.iter().all(|part| error.contains(part)) && users == of_the_user, "{error}");
    };
    has(says("org/nothing", "main", None), true, &["nobody without a token", "Repository not found", "set HF_TOKEN"]);
    has(says("org/name", "v9", None), true, &["org/name@v9: there is no such revision"]);
    server.trouble("HEAD config.json", &[Trouble::Status(403, "X-Error-Code: GatedRepo\r\n")]);
    has(says("org/name", "main", Some("t")), true, &["config.json is gated", "accept its terms"]);
    server.trouble("GET main", &[Trouble::Status(429, "Retry-After: 100000\r\n")]);
    has(says("org/name", "main", None), false, &["429", "asks to be left alone for 100000 s"]);
    server.trouble("GET tokenizer.json", &[Trouble::Flipped]);
    has(says("org/name", "main", None), false, &["fetching tokenizer.json", "its hash is", "is deleted"]);
    fetched(&server.hub(cache.path(), None).folder("org/name", "main", Scope::Whole).unwrap());

    // Nobody there: what was fetched is taken, else it is an error.
    let nobody = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let client = Client::new(&format!("http://127.0.0.1:{nobody}"), None, true, Duration::from_millis(1));
    let hub = Hub { cache: cache.path().into(), client: Some(client) };
    fetched(&hub.folder("org/name", "main", Scope::Whole).unwrap());
    let error = hub.folder("org/other", "main", Scope::Whole).unwrap_err();
    assert!(
        error.to_string().contains("the Hub cannot be reached") && error.to_string().contains("after 5 tries"),
        "{error}"
    );
}

/// Python's huggingface_hub finds what kiln fetched, and kiln what that fetched from the same server: which
/// shows too that the server speaks as the Hub does.
#[test]
fn python_shares_the_cache() {
    let Some(python) = crate::testing::python() else { return };
    let (server, ours, theirs) = (Server::start(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let folder = server.hub(ours.path(), None).folder("org/name", "main", Scope::Whole).unwrap();
    let run = |cache: &Path, offline: &str| {
        let script = "import sys, huggingface_hub as hub\n\
                      for name in sys.argv[1:]: print(hub.hf_hub_download('org/name', name))";
        let mut command = std::process::Command::new(&python);
        command.args(["-c", script]).args(files().keys().filter(|name| **name != "training_args.bin"));
        command.envs([("HF_HUB_OFFLINE", offline), ("HF_ENDPOINT", &server.endpoint)]).env("HF_HUB_CACHE", cache);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let paths = run(ours.path(), "1");
    assert!(paths.lines().count() == 6 && paths.lines().all(|path| Path::new(path).starts_with(&folder)), "{paths}");
    run(theirs.path(), "0");
    let offline = Hub { cache: theirs.path().into(), client: None };
    fetched(&offline.folder("org/name", "main", Scope::Whole).unwrap());
}
