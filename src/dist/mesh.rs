//! A connection between every two ranks, and one primitive over them: some bytes go out and some
//! come in, all at once, so that no order of sends and receives can block.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, Result, anyhow};

/// Bytes that are read or written in one go: they stay in a core's cache until they are added.
const PIECE: usize = 256 << 10;

/// A rank that waits is woken when so many bytes are there, not by each packet: it is the sender's time that
/// waking takes.
const LOW_WATER: usize = 1 << 20;

/// How long a wait on the sockets lasts before it starts anew, in ms.
const POLL: i32 = 1000;

/// The connections of one rank.
pub(super) struct Mesh {
    /// By rank; none to itself.
    peers: Vec<Option<TcpStream>>,
    scratch: Vec<u8>,
}

/// Bytes for another rank.
pub(super) struct Outgoing<'a> {
    pub to: usize,
    pub bytes: &'a [u8],
}

/// Bytes from another rank.
pub(super) struct Incoming<'a> {
    pub from: usize,
    pub into: Sink<'a>,
}

/// Where bytes go that come in.
pub(super) enum Sink<'a> {
    /// Here.
    Place(&'a mut [u8]),
    /// So many to this function, in order, in pieces of a multiple of 4 but for the last.
    Fold(usize, &'a mut dyn FnMut(&[u8])),
}

impl Sink<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Place(bytes) => bytes.len(),
            Self::Fold(len, _) => *len,
        }
    }
}

impl Mesh {
    pub fn new(peers: Vec<Option<TcpStream>>) -> Result<Self> {
        for stream in peers.iter().flatten() {
            stream.set_nodelay(true).and_then(|()| stream.set_nonblocking(true)).context("setting up connections")?;
        }
        Ok(Self { peers, scratch: vec![0; PIECE] })
    }

    /// The connections there are.
    pub fn streams(&self) -> impl Iterator<Item = &TcpStream> {
        self.peers.iter().flatten()
    }

    /// Sends and receives all there is to send and receive; at most one of each for a peer.
    ///
    /// # Errors
    /// A connection that broke.
    pub fn exchange(&mut self, sends: &[Outgoing<'_>], receives: &mut [Incoming<'_>]) -> Result<()> {
        let mut sent = vec![0; sends.len()];
        let mut received = vec![0; receives.len()];
        // Bytes of an element of which the rest has not come: they open the next piece.
        let mut held = vec![Vec::new(); receives.len()];
        loop {
            let mut moved = false;
            let mut waiting = Vec::new();
            for (send, done) in sends.iter().zip(&mut sent).filter(|(send, done)| **done < send.bytes.len()) {
                let mut stream = self.peer(send.to)?;
                let end = send.bytes.len().min(*done + PIECE);
                match stream.write(&send.bytes[*done..end]) {
                    Ok(n) => (*done, moved) = (*done + n, true),
                    Err(e) if e.kind() == ErrorKind::WouldBlock => waiting.push((stream.as_raw_fd(), libc::POLLOUT)),
                    Err(e) if e.kind() == ErrorKind::Interrupted => moved = true,
                    Err(e) => return Err(broken(send.to, &e)),
                }
            }
            for ((receive, done), held) in receives.iter_mut().zip(&mut received).zip(&mut held) {
                let rest = receive.into.len() - *done;
                if rest == 0 {
                    continue;
                }
                let stream = self.peers.get(receive.from).and_then(Option::as_ref);
                let mut stream = stream.ok_or_else(|| no_connection(receive.from))?;
                let got = match &mut receive.into {
                    Sink::Place(bytes) => stream.read(&mut bytes[*done..]),
                    Sink::Fold(..) => {
                        let kept = held.len();
                        self.scratch[..kept].copy_from_slice(held);
                        let end = PIECE.min(kept + rest);
                        stream.read(&mut self.scratch[kept..end])
                    }
                };
                match got {
                    Ok(0) => return Err(broken(receive.from, &ErrorKind::UnexpectedEof.into())),
                    Ok(n) => {
                        (*done, moved) = (*done + n, true);
                        if let Sink::Fold(len, fold) = &mut receive.into {
                            let have = held.len() + n;
                            let whole = if *done == *len { have } else { have / 4 * 4 };
                            fold(&self.scratch[..whole]);
                            held.clear();
                            held.extend_from_slice(&self.scratch[whole..have]);
                        }
                    }
                    Err(e) if e.kind() == ErrorKind::WouldBlock => {
                        wake_at(stream, rest.min(LOW_WATER));
                        waiting.push((stream.as_raw_fd(), libc::POLLIN));
                    }
                    Err(e) if e.kind() == ErrorKind::Interrupted => moved = true,
                    Err(e) => return Err(broken(receive.from, &e)),
                }
            }
            if !moved {
                if waiting.is_empty() {
                    return Ok(());
                }
                wait(&waiting);
            }
        }
    }

    fn peer(&self, rank: usize) -> Result<&TcpStream> {
        self.peers.get(rank).and_then(Option::as_ref).ok_or_else(|| no_connection(rank))
    }
}

fn no_connection(rank: usize) -> anyhow::Error {
    anyhow!("there is no connection to rank {rank}")
}

fn broken(rank: usize, error: &std::io::Error) -> anyhow::Error {
    anyhow!("the connection to rank {rank} broke: {error}")
}

/// Has a wait for bytes end when so many are there. Where the system does not do it, waits end earlier.
fn wake_at(stream: &TcpStream, bytes: usize) {
    let bytes = bytes as libc::c_int;
    let size = size_of_val(&bytes) as libc::socklen_t;
    // SAFETY: the option is an int, and lives as long as the call.
    unsafe {
        libc::setsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, (&raw const bytes).cast(), size)
    };
}

/// Waits until one of the sockets can go on, or some time has passed.
fn wait(sockets: &[(i32, i16)]) {
    let mut polled: Vec<libc::pollfd> = Vec::with_capacity(sockets.len());
    for &(fd, events) in sockets {
        match polled.iter_mut().find(|p| p.fd == fd) {
            Some(p) => p.events |= events,
            None => polled.push(libc::pollfd { fd, events, revents: 0 }),
        }
    }
    // SAFETY: the array is ours and as long as is said. Whatever it returns, the sockets are tried again.
    unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, POLL) };
}
