//! Pictures, as text.

use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::board::Board;
use super::draw::draw;
use crate::track::{Evaluation, Step};

/// A training of which `steps` of 300 are done, evaluated every 100.
fn board(steps: u64) -> Board {
    let mut board = Board { label: "train minilm".into(), total: 300, ..Board::default() };
    for step in 1..=steps {
        let loss = 2.5 * 0.985f64.powi(step as i32);
        board.loss.push(step as f64, loss);
        board.step = Some(Step {
            time: 0.0,
            step,
            epoch: step as f64 / 100.0,
            train_loss: loss,
            learning_rate: 5e-5,
            grad_norm: 1.25,
            tokens_per_second: 41234.5,
        });
        if step.is_multiple_of(100) {
            board.evaluations.push(evaluation(step));
        }
    }
    board.memory = (Some(310_000_000), Some(7_800_000_000));
    board.seconds_left = (steps > 0).then_some(75.0);
    board
}

fn evaluation(step: u64) -> Evaluation {
    Evaluation {
        step,
        epoch: step as f64 / 100.0,
        train_loss: 0.5,
        validation_loss: 60.0 / step as f64,
        validation_accuracy: 0.975,
        validation_macro_f1: 0.6 + step as f64 / 1000.0,
        validation_micro_f1: 0.975,
        validation_weighted_f1: 0.974,
        best: true,
    }
}

fn picture(board: &Board, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, board)).unwrap();
    let text = terminal.backend().to_string();
    // The backend quotes each line.
    text.lines().map(|line| line.trim_matches('"').trim_end()).collect::<Vec<_>>().join("\n")
}

/// Set, these pictures are written anew: look at what changed.
const AGAIN: &str = "KILN_DRAW";

#[test]
fn three_sizes_look_as_they_should() {
    for (width, height) in [(100, 30), (80, 24), (40, 10)] {
        let file = format!("{}/src/dashboard/pictures/{width}x{height}.txt", env!("CARGO_MANIFEST_DIR"));
        let drawn = picture(&board(220), width, height) + "\n";
        if std::env::var_os(AGAIN).is_some() {
            crate::store::write_bytes(file.as_ref(), drawn.as_bytes()).unwrap();
        }
        let expected = std::fs::read_to_string(&file).unwrap();
        assert_eq!(drawn, expected, "{width} × {height}; {AGAIN}=1 draws {file} anew");
        for word in ["train minilm", "220/300 steps", "1:15 left", "loss", "41,234 tokens/s", "macro F1 0.8000"] {
            assert!(drawn.contains(word), "{width} × {height} lacks {word:?}:\n{drawn}");
        }
    }
}

#[test]
fn no_size_and_no_state_panics() {
    let mut broken = board(150);
    broken.loss.push(151.0, f64::NAN);
    broken.evaluations[0].validation_macro_f1 = f64::NAN;
    broken.step.as_mut().unwrap().train_loss = f64::INFINITY;
    broken.total = 0;
    for board in [board(0), board(1), board(300), Board::default(), broken] {
        for ending in [false, true] {
            let board = Board { ending, ..board.clone() };
            for (width, height) in [(1, 1), (3, 2), (10, 4), (20, 5), (40, 10), (41, 17), (80, 24), (300, 90)] {
                picture(&board, width, height);
            }
        }
    }
}
