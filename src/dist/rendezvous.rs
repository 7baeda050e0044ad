//! How ranks find one another: rank 0 listens at the master's address, the others come to it, and each
//! learns where all the rest take connections.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs as _};
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
const LINE: usize = 1 << 20;

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
    let Group { me, key, links, listener, members } = result.with_context(|| {
        format!("rank {} of {} at {}:{}", world.rank, world.world_size, world.master_addr, world.master_port)
    })?;
    let pulse = Pulse::start(me.clone(), links, timing)?;
    match connect(&me, &key, &listener, &members, &pulse, until) {
        Ok(mesh) => Ok((mesh, pulse)),
        Err(error) => {
            pulse.abort(&format!("{error:#}"));
            let verdict = pulse.verdict().map_or(error, anyhow::Error::msg); // an earlier one is the cause
            pulse.leave();
            Err(verdict)
        }
    }
}

/// Connects a rank to all others, for data. Heartbeats go on meanwhile.
fn connect(
    me: &Member,
    key: &str,
    listener: &TcpListener,
    members: &[Member],
    pulse: &Pulse,
    until: Instant,
) -> Result<Mesh> {
    let mut data: Vec<Option<TcpStream>> = members.iter().map(|_| None).collect();
    // Each rank calls those below it, and is called by those above.
    for member in members.iter().filter(|member| member.rank < me.rank) {
        let mut stream = call(&[member.address], until, || pulse.verdict().is_some())
            .with_context(|| format!("cannot reach {member} at {}", member.address))?;
        say(&mut stream, &Hello::Data { key: key.into(), rank: me.rank })?;
        data[member.rank] = Some(stream);
    }
    listener.set_nonblocking(true)?;
    while data[me.rank + 1..].iter().any(Option::is_none) {
        let Some(mut stream) = accept(listener, until, || pulse.verdict().is_some())? else {
            let missing = (me.rank + 1..members.len()).filter(|&rank| data[rank].is_none());
            bail!("no connection came from {}", ranks(missing));
        };
        if let Ok(Hello::Data { key: theirs, rank }) = hear(&mut stream, Instant::now() + INTRODUCTION)
            && theirs == key
            && (me.rank + 1..members.len()).contains(&rank)
        {
            data[rank] = Some(stream);
        } // else a stranger
    }
    let mesh = Mesh::new(data)?;
    mesh.streams().try_for_each(|stream| pulse.guard(stream))?;
    Ok(mesh)
}

/// What a rank knows when all are there.
struct Group {
    me: Member,
    key: String,
    /// Connections for heartbeats.
    links: Vec<(Member, TcpStream)>,
    /// Where this rank takes connections for data.
    listener: TcpListener,
    /// All, by rank.
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
        let Some(mut stream) = accept(&listener, until, || false)? else {
            let missing = (1..world.world_size).filter(|rank| !joined.contains_key(rank));
            bail!("{} did not come within the time of train.distributed.timeout_s", ranks(missing));
        };
        let Ok(Hello::Join { world_size, job: theirs, member }) = hear(&mut stream, Instant::now() + INTRODUCTION)
        else {
            continue; // a stranger
        };
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
    Ok(Group { me, key, links, listener, members })
}

/// Every other rank's part.
fn come(world: &World, job: &str, until: Instant) -> Result<Group> {
    let mut stream = loop {
        // A name that is not known yet may be in a moment, as rank 0 may not be there yet.
        let addresses = (world.master_addr.as_str(), world.master_port).to_socket_addrs();
        let addresses = addresses.map(Vec::from_iter).and_then(|addresses| call(&addresses, Instant::now(), || false));
        match addresses {
            Ok(stream) => break stream,
            Err(e) if Instant::now() > until => {
                return Err(anyhow!(e).context("rank 0 cannot be reached; is it running, and MASTER_ADDR its host?"));
            }
            Err(_) => thread::sleep(RETRY),
        }
    };
    // Reachable by the way that leads to rank 0; which may be one that other machines do not have.
    let here = stream.local_addr()?.ip();
    let at = if here.is_loopback() && is_on_many_machines(world) { unspecified(here) } else { here };
    let listener = TcpListener::bind((at, 0))?;
    let address = SocketAddr::new(here, listener.local_addr()?.port());
    let me = Member { rank: world.rank, pid: std::process::id(), host: store::host(), address };
    say(&mut stream, &Hello::Join { world_size: world.world_size, job: job.into(), member: me.clone() })?;
    let (key, mut members) = match hear(&mut stream, until).context("rank 0 did not bring all ranks together")? {
        Answer::Welcome { key, members } => (key, members),
        Answer::Refused(why) => return Err(user_error!("{why}")),
    };
    ensure!(members.iter().map(|member| member.rank).eq(0..world.world_size), "rank 0 names other ranks");
    let rank_0 = stream.peer_addr()?;
    members[0].address = rank_0;
    for member in members.iter_mut().filter(|member| member.address.ip().is_loopback()) {
        member.address.set_ip(rank_0.ip()); // it is on rank 0's machine
    }
    let links = vec![(members[0].clone(), stream)];
    Ok(Group { me, key, links, listener, members })
}

fn is_on_many_machines(world: &World) -> bool {
    world.world_size > world.local_world_size
}

/// All addresses of a machine.
fn unspecified(like: IpAddr) -> IpAddr {
    if like.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}

/// Listens at the master's address. Where that is another's name for this host, or one by which other
/// machines do not reach it (many have their own name for 127.0.1.1), at all of its addresses.
fn listen(world: &World) -> Result<TcpListener> {
    let everywhere = || TcpListener::bind((Ipv4Addr::UNSPECIFIED, world.master_port));
    let bound = match TcpListener::bind((world.master_addr.as_str(), world.master_port)) {
        Err(e) if matches!(e.kind(), ErrorKind::AddrNotAvailable) => everywhere(),
        Ok(bound) if is_on_many_machines(world) && bound.local_addr()?.ip().is_loopback() => {
            drop(bound);
            everywhere()
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

/// The next connection, if one comes in time and before there is a reason to `stop`.
fn accept(listener: &TcpListener, until: Instant, stop: impl Fn() -> bool) -> Result<Option<TcpStream>> {
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
                if Instant::now() > until || stop() {
                    return Ok(None);
                }
                thread::sleep(Duration::from_millis(2));
            }
            Err(e) => return Err(e).context("waiting for the other ranks"),
        }
    }
}

/// A connection to the first of some addresses that takes one, tried until then or until there is a reason to
/// `stop`.
fn call(addresses: &[SocketAddr], until: Instant, stop: impl Fn() -> bool) -> std::io::Result<TcpStream> {
    loop {
        let mut last = ErrorKind::NotFound.into();
        for address in addresses {
            match TcpStream::connect_timeout(address, INTRODUCTION) {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        if Instant::now() >= until || stop() {
            return Err(last);
        }
        thread::sleep(RETRY);
    }
}

fn say(stream: &mut TcpStream, message: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(stream.write_all(&line)?)
}

/// Reads one line that comes in time, and no byte past it: what comes next belongs to others.
fn hear<T: serde::de::DeserializeOwned>(stream: &mut TcpStream, until: Instant) -> Result<T> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while byte != *b"\n" {
        let left = until.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero() && line.len() < LINE, "the other end does not come to an end");
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut byte) {
            Ok(0) => bail!("the other end said nothing"),
            Ok(_) => line.extend_from_slice(&byte),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
            Err(e) => return Err(e.into()),
        }
    }
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
