//! How ranks find one another: rank 0 listens at the master's address, the others come to it, and each
//! learns where all the rest take connections.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};

use super::World;
use super::mesh::Mesh;
use super::pulse::{Member, Pulse, Timing};
use crate::{store, user_error};

/// Time between two tries to reach rank 0.
const RETRY: Duration = Duration::from_millis(100);
/// What a connection is given to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(5);
/// The longest line of an introduction: the members of a world of some thousands.
const LINE: u64 = 1 << 20;

/// The first line on every connection.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Hello {
    /// To rank 0, for heartbeats.
    Join { world_size: usize, job: String, member: Member },
    /// Between any two ranks of the group with this key, for data.
    Data { key: String, rank: usize },
}

/// Rank 0's answer to [`Hello::Join`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Welcome { key: String, members: Vec<Member> },
    Refused(String),
}

/// Brings the ranks of `world` together, which have to be about the same `job`.
///
/// # Errors
/// Ranks that do not come in time, or that do not belong together; the user's where rank 0's address
/// cannot be.
pub(super) fn join(world: &World, job: &str, timing: Timing) -> Result<(Mesh, Arc<Pulse>)> {
    let until = Instant::now() + timing.progress;
    let result = if world.rank == 0 { gather(world, job, until) } else { come(world, job, until) };
    let Group { me, key, links, listener, mut data, members } = result.with_context(|| {
        format!("rank {} of {} at {}:{}", world.rank, world.world_size, world.master_addr, world.master_port)
    })?;
    // Each rank calls those below it, and is called by those above.
    for member in members.iter().filter(|member| member.rank < me.rank) {
        let mut stream = call(member.address, until).with_context(|| format!("cannot reach {member}"))?;
        say(&mut stream, &Hello::Data { key: key.clone(), rank: me.rank })?;
        data.insert(member.rank, stream);
    }
    listener.set_nonblocking(true)?;
    while data.len() + 1 < world.world_size {
        let Some(mut stream) = accept(&listener, until)? else {
            let missing = (0..world.world_size).filter(|rank| *rank != me.rank && !data.contains_key(rank));
            bail!("no connection came from {}", ranks(missing));
        };
        if let Ok(Hello::Data { key: theirs, rank }) = hear(&mut stream)
            && theirs == key
            && (me.rank + 1..world.world_size).contains(&rank)
        {
            data.insert(rank, stream);
        } // else a stranger
    }
    let mesh = Mesh::new((0..world.world_size).map(|rank| data.remove(&rank)).collect())?;
    let pulse = Pulse::start(me, links, timing)?;
    mesh.streams().try_for_each(|stream| pulse.guard(stream))?;
    Ok((mesh, pulse))
}

/// What a rank knows when all are there.
struct Group {
    me: Member,
    key: String,
    /// Connections for heartbeats.
    links: Vec<(Member, TcpStream)>,
    /// Where this rank takes connections for data.
    listener: TcpListener,
    /// Those that came early.
    data: BTreeMap<usize, TcpStream>,
    members: Vec<Member>,
}

/// Rank 0's part.
fn gather(world: &World, job: &str, until: Instant) -> Result<Group> {
    let listener = listen(world)?;
    let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), listener.local_addr()?.port());
    let me = Member { rank: 0, pid: std::process::id(), host: store::host(), address };
    listener.set_nonblocking(true)?;
    let mut joined: BTreeMap<usize, (Member, TcpStream)> = BTreeMap::new();
    while joined.len() + 1 < world.world_size {
        let Some(mut stream) = accept(&listener, until)? else {
            let missing = (1..world.world_size).filter(|rank| !joined.contains_key(rank));
            bail!("{} did not come within the time of train.distributed.timeout_s", ranks(missing));
        };
        let Ok(Hello::Join { world_size, job: theirs, member }) = hear(&mut stream) else { continue }; // a stranger
        let problem = if world_size != world.world_size {
            Some(format!("{member} is of a world of {world_size}, rank 0 of one of {}", world.world_size))
        } else if theirs != job {
            Some(format!(
                "{member} has another experiment, other data or another kiln than rank 0 (process {})",
                me.pid
            ))
        } else if member.rank == 0 || member.rank >= world.world_size {
            Some(format!("{member} is none of the ranks 1 to {}", world.world_size - 1))
        } else {
            joined.get(&member.rank).map(|(other, _)| format!("{member} and {other} are both there"))
        };
        if let Some(problem) = problem {
            let others = joined.values_mut().map(|(_, stream)| stream);
            for stream in others.chain(std::iter::once(&mut stream)) {
                let _ = say(stream, &Answer::Refused(problem.clone())); // that one is gone is not the news
            }
            return Err(user_error!("{problem}"));
        }
        joined.insert(member.rank, (member, stream));
    }
    let members: Vec<_> =
        std::iter::once(me.clone()).chain(joined.values().map(|(member, _)| member.clone())).collect();
    let key = key(&me);
    let mut links: Vec<_> = joined.into_values().collect();
    for (member, stream) in &mut links {
        say(stream, &Answer::Welcome { key: key.clone(), members: members.clone() })
            .with_context(|| format!("{member} went away"))?;
    }
    Ok(Group { me, key, links, listener, data: BTreeMap::new(), members })
}

/// Every other rank's part.
fn come(world: &World, job: &str, until: Instant) -> Result<Group> {
    let master = (world.master_addr.as_str(), world.master_port);
    let mut stream = loop {
        let reached = master.to_socket_addrs().and_then(|mut addresses| {
            let address = addresses.next().ok_or(ErrorKind::NotFound)?;
            TcpStream::connect_timeout(&address, INTRODUCTION)
        });
        match reached {
            Ok(stream) => break stream,
            Err(e) if Instant::now() > until => {
                return Err(anyhow!(e).context("rank 0 cannot be reached; is it running, and MASTER_ADDR its host?"));
            }
            Err(_) => thread::sleep(RETRY), // it may not be there yet
        }
    };
    // Reachable by the way that leads to rank 0.
    let listener = TcpListener::bind((stream.local_addr()?.ip(), 0))?;
    let me = Member { rank: world.rank, pid: std::process::id(), host: store::host(), address: listener.local_addr()? };
    say(&mut stream, &Hello::Join { world_size: world.world_size, job: job.into(), member: me.clone() })?;
    stream.set_read_timeout(Some(until.saturating_duration_since(Instant::now()).max(RETRY)))?;
    let mut members = match hear(&mut stream).context("rank 0 did not bring all ranks together")? {
        Answer::Welcome { key, members } => (key, members),
        Answer::Refused(why) => return Err(user_error!("{why}")),
    };
    let rank_0 = members.1.first_mut().context("rank 0 names no ranks")?;
    rank_0.address = stream.peer_addr()?;
    let links = vec![(rank_0.clone(), stream)];
    Ok(Group { me, key: members.0, links, listener, data: BTreeMap::new(), members: members.1 })
}

/// Listens at the master's address; where that is another's name for this host, at all of its addresses.
fn listen(world: &World) -> Result<TcpListener> {
    let all = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).map(drop); // whether there is a network at all
    all.context("cannot listen for the other ranks")?;
    let at = (world.master_addr.as_str(), world.master_port);
    let bound = match TcpListener::bind(at) {
        Err(e) if matches!(e.kind(), ErrorKind::AddrNotAvailable) => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, world.master_port))
        }
        bound => bound,
    };
    bound.map_err(|e| {
        user_error!(
            "rank 0 cannot listen at {}:{}: {e}; set MASTER_ADDR to this host and MASTER_PORT to a free port",
            world.master_addr,
            world.master_port
        )
    })
}

fn accept(listener: &TcpListener, until: Instant) -> Result<Option<TcpStream>> {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(Some(stream));
            }
            Err(e)
                if matches!(
                    e.kind(),
                    ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                ) =>
            {
                if Instant::now() > until {
                    return Ok(None);
                }
                thread::sleep(Duration::from_millis(2));
            }
            Err(e) => return Err(e).context("waiting for the other ranks"),
        }
    }
}

fn call(address: SocketAddr, until: Instant) -> std::io::Result<TcpStream> {
    loop {
        match TcpStream::connect_timeout(&address, INTRODUCTION) {
            Err(_) if Instant::now() < until => thread::sleep(RETRY),
            reached => return reached,
        }
    }
}

fn say(stream: &mut TcpStream, message: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(stream.write_all(&line)?)
}

/// Reads one line and no byte past it: what comes next belongs to others.
fn hear<T: serde::de::DeserializeOwned>(stream: &mut TcpStream) -> Result<T> {
    if stream.read_timeout()?.is_none() {
        stream.set_read_timeout(Some(INTRODUCTION))?;
    }
    let mut line = Vec::new();
    let mut one = BufReader::with_capacity(1, std::io::Read::take(&*stream, LINE));
    one.read_until(b'\n', &mut line)?;
    ensure!(line.ends_with(b"\n"), "the other end said nothing");
    stream.set_read_timeout(None)?;
    Ok(serde_json::from_slice(&line)?)
}

/// What only the ranks of this group know.
fn key(me: &Member) -> String {
    use std::hash::{BuildHasher as _, RandomState};
    format!("{:016x}{:016x}", RandomState::new().hash_one(me.pid), RandomState::new().hash_one(&me.host))
}

/// `rank 3`, `ranks 1, 2`.
fn ranks(ranks: impl Iterator<Item = usize>) -> String {
    let ranks: Vec<_> = ranks.map(|rank| rank.to_string()).collect();
    format!("rank{} {}", if ranks.len() == 1 { "" } else { "s" }, ranks.join(", "))
}
