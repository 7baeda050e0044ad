//! The Hub's HTTP: redirects that do not take the token elsewhere, pieces of files, and patience with a server
//! that is busy or breaks off.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use ureq::Body;
use ureq::http::{Response, StatusCode, Uri};

use crate::error::say;
use crate::progress::Progress;
use crate::user_error;

/// The Hub, unless HF_ENDPOINT names another.
pub(super) const ENDPOINT: &str = "https://huggingface.co";
/// Tries of one request, as long as nothing comes of it.
const TRIES: u32 = 5;
/// The longest that a server may ask to be left alone; beyond it the answer is an error.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Bytes asked for at once: a piece that stands still is given up, which a whole file could not be.
const PIECE: u64 = 64 << 20;
const REDIRECTS: usize = 5;

/// A Hub that speaks HTTP.
pub(super) struct Client {
    endpoint: String,
    token: Option<String>,
    agent: ureq::Agent,
    quiet: bool,
    /// Before the second try; then twice as long each time.
    pause: Duration,
}

/// A file of a commit, as the Hub describes it.
pub(super) struct Remote {
    url: String,
    name: String,
    /// Its hash.
    pub etag: String,
    /// In bytes.
    pub size: u64,
}

/// Nobody answers.
#[derive(Debug, thiserror::Error)]
#[error("the Hub cannot be reached: {0}")]
pub(super) struct Unreachable(String);

impl Client {
    pub fn new(endpoint: &str, token: Option<String>, quiet: bool, pause: Duration) -> Self {
        let agent = ureq::Agent::config_builder()
            .max_redirects(0)
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(Duration::from_secs(30)))
            .timeout_recv_body(Some(Duration::from_secs(300)))
            .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
            .build()
            .into();
        Self { endpoint: endpoint.trim_end_matches('/').into(), token, agent, quiet, pause }
    }

    /// What a revision is, and has.
    pub fn listing<T: serde::de::DeserializeOwned>(&self, repository: &str, revision: &str) -> Result<T> {
        let url = format!("{}/api/models/{repository}/revision/{}", self.endpoint, revision.replace('/', "%2F"));
        let response = self.request("GET", &url, None, true)?;
        let response = self.expect(response, &format!("{repository}@{revision}"))?;
        let text = response.into_body().read_to_string().with_context(|| format!("reading {url}"))?;
        serde_json::from_str(&text).with_context(|| format!("what {url} says of {repository} cannot be read"))
    }

    /// A file's hash and size.
    pub fn look(&self, repository: &str, commit: &str, file: &str) -> Result<Remote> {
        let url = format!("{}/{repository}/resolve/{commit}/{file}", self.endpoint);
        let response = self.request("HEAD", &url, None, false)?;
        let status = response.status();
        let response = if status.is_redirection() { response } else { self.expect(response, file)? };
        let header = |names: [&str; 2]| names.into_iter().find_map(|name| header(&response, name));
        let etag = header(["x-linked-etag", "etag"]).with_context(|| format!("{url} has no ETag"))?;
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_ascii_lowercase();
        // It will be a file's name.
        ensure!(
            etag.bytes().all(|byte| byte.is_ascii_hexdigit()) && !etag.is_empty(),
            "{url} has ETag {etag:?}: needs a hash"
        );
        let size = header(["x-linked-size", "content-length"]).and_then(|size| size.parse().ok());
        let size = size.with_context(|| format!("{url} has no size"))?;
        Ok(Remote { url, name: file.into(), etag, size })
    }

    /// Appends to `file` what it lacks.
    pub fn download(&self, remote: &Remote, file: &mut File) -> Result<()> {
        let progress = Progress::new(&remote.name, remote.size, "byte", self.quiet || remote.size < PIECE);
        let mut tries = 0;
        loop {
            let have = file.seek(SeekFrom::End(0))?;
            progress.set(have.min(remote.size), "");
            if have == remote.size {
                progress.finish();
                return Ok(());
            }
            let tried = if have > remote.size {
                Err(anyhow!("there are {have} bytes already"))
            } else {
                self.piece(remote, file, have)
            };
            match tried {
                Ok(()) => tries = 0,
                Err(error) if error.is::<Fatal>() || error.is::<Unreachable>() => return Err(error),
                Err(error) => {
                    let now = file.seek(SeekFrom::End(0))?;
                    tries = if now > have { 1 } else { tries + 1 };
                    if now > remote.size {
                        file.set_len(0)?;
                    }
                    if tries >= TRIES {
                        return Err(
                            error.context(format!("it broke off {tries} times at byte {now} of {}", remote.size))
                        );
                    }
                    self.wait(tries, None, &format!("{}, at byte {now} of {}: {error:#}", remote.name, remote.size));
                }
            }
        }
    }

    /// One piece, from byte `have` on.
    fn piece(&self, remote: &Remote, file: &mut File, have: u64) -> Result<()> {
        let end = (have + PIECE).min(remote.size);
        let response = self.request("GET", &remote.url, Some((have, end - 1)), true)?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = header(&response, "content-range").unwrap_or_default();
                ensure!(
                    range.starts_with(&format!("bytes {have}-")),
                    "bytes {have} to {end} were asked for, {range:?} came"
                );
            }
            StatusCode::OK if have > 0 => file.set_len(0)?, // it knows no pieces
            StatusCode::OK => {}
            StatusCode::RANGE_NOT_SATISFIABLE => {
                file.set_len(0)?;
                bail!("there is no byte {have}");
            }
            _ => return self.expect(response, &remote.name).map(drop).map_err(|error| error.context(Fatal)),
        }
        // Never more than was promised: a wrong server fills no disk.
        let start = file.seek(SeekFrom::End(0))?;
        let mut body = response.into_body().into_reader().take(remote.size - start + 1);
        io::copy(&mut body, file)?;
        file.flush()?;
        Ok(())
    }

    /// Makes a request until it is answered. Follows redirects, all of them or those to the same host: the
    /// answer of the Hub itself describes a file, where another host has it.
    fn request(&self, method: &str, url: &str, range: Option<(u64, u64)>, everywhere: bool) -> Result<Response<Body>> {
        let mut tries = 0;
        loop {
            let answer = self.follow(method, url, range, everywhere);
            tries += 1;
            let (why, pause) = match answer {
                Ok(response) if is_busy(response.status()) => {
                    let pause = header(&response, "retry-after").and_then(|value| value.trim().parse().ok());
                    (format!("{url}: {}", response.status()), pause.map(Duration::from_secs))
                }
                Err(error) => match error.downcast::<Unreachable>() {
                    Ok(Unreachable(why)) => (why, None),
                    Err(error) => return Err(error),
                },
                answer => return answer,
            };
            if tries >= TRIES || pause.is_some_and(|pause| pause > LONGEST_PAUSE) {
                let pause = pause.map(|pause| format!(", and asks to be left alone for {} s", pause.as_secs()));
                bail!(Unreachable(format!("{why}, after {tries} tries{}", pause.unwrap_or_default())));
            }
            self.wait(tries, pause, &why);
        }
    }

    fn follow(&self, method: &str, url: &str, range: Option<(u64, u64)>, everywhere: bool) -> Result<Response<Body>> {
        let parse =
            |url: &str| url.parse::<Uri>().map_err(|e| user_error!("{url:?} is no address ({e}); is HF_ENDPOINT one?"));
        let (home, mut at) = (parse(&self.endpoint)?, parse(url)?);
        for _ in 0..=REDIRECTS {
            let mut request = ureq::http::Request::builder().method(method).uri(&at);
            if let Some(token) = self.token.as_ref().filter(|_| at.authority() == home.authority()) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            if let Some((first, last)) = range {
                request = request.header("range", format!("bytes={first}-{last}"));
            }
            // What a file's hash and size are of is not a compressed copy.
            let request = request.header("accept-encoding", "identity").body(());
            let request = request.map_err(|e| user_error!("{at} cannot be asked for ({e}); is HF_TOKEN a token?"))?;
            let response = self.agent.run(request).map_err(|e| Unreachable(format!("{at}: {e}")))?;
            let location = header(&response, "location").filter(|_| response.status().is_redirection());
            let Some(location) = location else { return Ok(response) };
            let next = absolute(&at, &location).with_context(|| format!("{at} leads to {location:?}"))?;
            if !everywhere && next.authority() != at.authority() {
                return Ok(response);
            }
            at = next;
        }
        bail!("{url} leads to another place more than {REDIRECTS} times")
    }

    fn wait(&self, tries: u32, asked: Option<Duration>, why: &str) {
        let pause = asked.unwrap_or(self.pause * 2u32.pow(tries - 1));
        if !self.quiet {
            say(format_args!("{why}; trying again in {:.1} s", pause.as_secs_f64()));
        }
        thread::sleep(pause);
    }

    /// The response, if it is a good one.
    fn expect(&self, response: Response<Body>, what: &str) -> Result<Response<Body>> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let code = header(&response, "x-error-code").unwrap_or_default();
        let message = header(&response, "x-error-message").map(|message| format!(": {message}")).unwrap_or_default();
        let token = if self.token.is_some() { "the token that was sent" } else { "nobody without a token" };
        Err(match (status.as_u16(), code.as_str()) {
            (401 | 403, "GatedRepo") => user_error!(
                "{what} is gated ({status}{message}): accept its terms on the Hub, and set HF_TOKEN to a token of \
                 that account"
            ),
            (404, "RevisionNotFound") => user_error!("{what}: there is no such revision ({status}{message})"),
            (404, _) => user_error!("{what} is not on the Hub ({status}{message}): is the name right?"),
            (401 | 403, _) => user_error!(
                "{what} is not there for {token} ({status}{message}): is the name right? If so, set HF_TOKEN to a \
                 token that may read it"
            ),
            _ => anyhow!("{what}: the Hub answers {status}{message}"),
        })
    }
}

/// An answer that no other try changes.
#[derive(Debug, thiserror::Error)]
#[error("the Hub refuses")]
struct Fatal;

fn is_busy(status: StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504)
}

fn header(response: &Response<Body>, name: &str) -> Option<String> {
    Some(response.headers().get(name)?.to_str().ok()?.to_owned())
}

/// Where a `Location` at `base` leads.
fn absolute(base: &Uri, location: &str) -> Result<Uri> {
    let next: Uri = location.parse()?;
    if next.authority().is_some() {
        return Ok(next);
    }
    let mut parts = base.clone().into_parts();
    parts.path_and_query = next.into_parts().path_and_query;
    Ok(Uri::from_parts(parts)?)
}
