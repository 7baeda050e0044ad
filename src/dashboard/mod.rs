//! `kiln train --tui`: a training on the whole terminal.
//!
//! It is drawn on stderr's alternate screen by a thread of its own, which hears the keys too. What is printed
//! meanwhile goes to the screen beneath, where it is read afterwards.

mod board;
mod draw;
#[cfg(test)]
mod tests;

use std::io::{self, IsTerminal as _, stderr, stdin, stdout};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::{Hide, Show};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode};

pub use board::Board;

use crate::config::available_memory;

/// Time between two pictures, and until a key is heard.
const EVERY: Duration = Duration::from_millis(200);

/// Whether the terminal is this module's at the moment.
static HELD: AtomicBool = AtomicBool::new(false);

/// Whether there is a terminal to draw on and to read from.
pub fn is_possible() -> bool {
    stdin().is_terminal() && stdout().is_terminal() && stderr().is_terminal()
}

/// A dashboard that is shown until it is dropped.
pub struct Dashboard {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    board: Mutex<Board>,
    /// Held while a picture is drawn, and while others print.
    screen: Mutex<()>,
    /// The next picture is drawn whole: the screen is another.
    stale: AtomicBool,
    ended: AtomicBool,
}

impl Dashboard {
    /// Takes the terminal.
    ///
    /// # Errors
    /// What the terminal says.
    pub fn new(label: &str, total: u64) -> io::Result<Self> {
        restore_on_panic();
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let memory = (board::resident(), available_memory());
        let board = Board { label: label.into(), total, memory, plain, ..Board::default() };
        let (screen, stale, ended) = (Mutex::default(), AtomicBool::new(true), AtomicBool::new(false));
        let shared = Arc::new(Shared { board: Mutex::new(board), screen, stale, ended });
        let terminal = Terminal::new(CrosstermBackend::new(stderr()))?;
        take_terminal()?;
        let drawn = shared.clone();
        let started = thread::Builder::new().name("dashboard".into()).spawn(move || drawn.show(terminal));
        let thread = Some(started.inspect_err(|_| restore())?);
        Ok(Self { shared, thread })
    }

    /// Changes what is drawn next.
    pub fn update(&self, change: impl FnOnce(&mut Board)) {
        change(&mut self.shared.board());
    }

    /// Runs what prints, on the screen beneath.
    pub fn suspend<T>(&self, print: impl FnOnce() -> T) -> T {
        let _screen = self.shared.screen.lock().unwrap_or_else(PoisonError::into_inner);
        restore();
        let result = print();
        self.shared.stale.store(true, Ordering::SeqCst);
        let _ = take_terminal(); // a terminal that is gone is no reason to stop a training
        result
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        restore();
    }
}

impl Shared {
    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Draws and hears keys to the end. A picture that cannot be drawn is left out: keys are heard still.
    fn show(&self, mut terminal: Terminal<CrosstermBackend<io::Stderr>>) {
        while !self.ended.load(Ordering::SeqCst) {
            let mut board = self.board().clone();
            board.memory.0 = board::resident();
            {
                let _screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
                if !HELD.load(Ordering::SeqCst) {
                    return; // the process ends
                }
                if self.stale.swap(false, Ordering::SeqCst) {
                    let _ = terminal.clear();
                }
                let _ = terminal.draw(|frame| draw::draw(frame, &board));
            }
            match event::poll(EVERY) {
                Ok(true) => match event::read() {
                    Ok(event) if ends(&event) => self.end(),
                    Ok(Event::Resize(..)) => self.stale.store(true, Ordering::SeqCst),
                    Ok(_) => {}
                    Err(_) => thread::sleep(EVERY),
                },
                Ok(false) => {}
                Err(_) => thread::sleep(EVERY),
            }
        }
    }

    /// What Ctrl-C does: the first asks for a checkpoint, the second ends the process.
    fn end(&self) {
        let asked = std::mem::replace(&mut self.board().ending, true);
        if asked {
            restore();
        }
        // What it could say, that there is no such signal, is not so.
        let _ = signal_hook::low_level::raise(signal_hook::consts::SIGINT);
    }
}

/// `q`, or Ctrl-C, which is no signal while keys come one by one.
fn ends(event: &Event) -> bool {
    let Event::Key(key) = event else { return false };
    let interrupt = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind == KeyEventKind::Press && (interrupt || key.code == KeyCode::Char('q'))
}

fn take_terminal() -> io::Result<()> {
    enable_raw_mode()?;
    HELD.store(true, Ordering::SeqCst);
    execute!(stderr(), EnterAlternateScreen, Hide).inspect_err(|_| restore())
}

/// Gives the terminal back as it was, if it is held: what ends the process without dropping anything calls
/// it too.
pub fn restore() {
    if HELD.swap(false, Ordering::SeqCst) {
        // A terminal that is gone cannot be given back.
        let _ = execute!(stderr(), LeaveAlternateScreen, Show);
        let _ = disable_raw_mode();
    }
}

/// What a panic says is read on the screen beneath.
fn restore_on_panic() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            before(panic);
        }));
    });
}
