//! One suite for every process group, and what becomes of ranks that fail.

use std::thread;
use std::time::{Duration, Instant};

use super::*;

/// What every process group has to do, seen by one of its ranks.
fn conforms(group: &mut dyn ProcessGroup) -> Result<()> {
    let (rank, world_size) = (group.rank(), group.world_size());
    // Small whole numbers: any order of additions gives the same sum.
    let value = |rank: usize, i: usize| ((rank * 7 + i * 3) % 11) as f32 - 5.0;
    for order in [Order::Fastest, Order::Tree] {
        for len in [0, 1, 2, 3, 5, 1000, 300_007] {
            let mine: Vec<f32> = (0..len).map(|i| value(rank, i)).collect();
            let sum: Vec<f32> = (0..len).map(|i| (0..world_size).map(|rank| value(rank, i)).sum()).collect();
            let mut numbers = mine.clone();
            group.all_reduce(Numbers::F32(&mut numbers), order)?;
            assert_eq!(numbers, sum, "{order:?} of {len}");
            let mut numbers: Vec<bf16> = mine.iter().map(|&x| bf16::from_f32(x)).collect();
            group.all_reduce(Numbers::Bf16(&mut numbers), order)?;
            assert_eq!(numbers.iter().map(|x| x.to_f32()).collect::<Vec<_>>(), sum, "bf16, {order:?} of {len}");
        }
        // All ranks have the same bits, whatever rounding did.
        let mut numbers: Vec<f32> = (0..10_001).map(|i| 1.0 / (1 + i * 13 + rank * 17) as f32).collect();
        group.all_reduce(Numbers::F32(&mut numbers), order)?;
        let bits: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let all = group.all_gather(&bits)?;
        assert!(all.iter().all(|other| *other == bits), "{order:?}");
        if order == Order::Tree {
            let part = |rank: usize, i: usize| 1.0 / (1 + i * 13 + rank * 17) as f32;
            for (i, got) in numbers.iter().enumerate() {
                assert_eq!(*got, tree(&(0..world_size).map(|rank| part(rank, i)).collect::<Vec<_>>()));
            }
        }
    }
    for root in 0..world_size {
        for len in [0, 1, 7, 100_003] {
            let mut numbers: Vec<f32> = (0..len).map(|i| (i + 1000 * rank) as f32).collect();
            group.broadcast(Numbers::F32(&mut numbers), root)?;
            assert!(numbers.iter().enumerate().all(|(i, &x)| x == (i + 1000 * root) as f32), "{len} from {root}");
        }
    }
    assert!(group.broadcast(Numbers::F32(&mut []), world_size).is_err(), "there is no such rank");
    let word = |rank: usize| vec![rank as u8; rank * 70_000];
    let gathered = group.all_gather(&word(rank))?;
    assert_eq!(gathered, (0..world_size).map(word).collect::<Vec<_>>());
    group.barrier()
}

fn tree(numbers: &[f32]) -> f32 {
    match numbers.len() {
        1 => numbers[0],
        n => {
            let half = n.next_power_of_two() / 2;
            tree(&numbers[..half]) + tree(&numbers[half..])
        }
    }
}

fn timing() -> Timing {
    let [beat, lost, grace] = [50, 700, 100].map(Duration::from_millis);
    Timing { beat, lost, grace, progress: Duration::from_secs(60), exit: None }
}

fn worlds(world_size: usize) -> Vec<World> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let master_port = listener.local_addr().unwrap().port();
    let world = |rank| World { rank, world_size, local_rank: rank, master_port, ..World::solo() };
    (0..world_size).map(world).collect()
}

/// Runs `work` as every rank of a world, each on a thread with its own sockets.
fn tcp<T: Send>(world_size: usize, timing: Timing, work: impl Fn(Tcp) -> T + Sync) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let ranks: Vec<_> = worlds(world_size)
            .into_iter()
            .map(|world| scope.spawn(move || work(Tcp::join(&world, "test", timing).unwrap())))
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn solo_conforms() {
    conforms(&mut Solo).unwrap();
}

#[test]
fn tcp_conforms() {
    for world_size in [1, 2, 3, 4, 7] {
        tcp(world_size, timing(), |mut group| conforms(&mut group).unwrap());
    }
}

#[test]
fn a_communicator_does_what_it_is_asked_in_order() {
    let work = |world: World| {
        let ranks = Communicator::new(move || Tcp::join(&world, "test", timing())).unwrap();
        let sums: Vec<_> = (0..5)
            .map(|i| {
                let mut numbers = vec![i as f32; 1000];
                ranks
                    .submit(move |group| group.all_reduce(Numbers::F32(&mut numbers), Order::Fastest).map(|()| numbers))
            })
            .collect();
        for (i, sum) in sums.into_iter().enumerate() {
            assert_eq!(sum.wait().unwrap(), vec![(3 * i) as f32; 1000]);
        }
        assert_eq!(ranks.in_turn(|| Ok(7)).unwrap(), 7);
        assert_eq!(ranks.all_gather(&ranks.rank()).unwrap(), [0, 1, 2]);
        assert_eq!(ranks.from_main(Some(&(ranks.rank() + 10))).unwrap(), 10);
        assert!(ranks.busy() > Duration::ZERO);
    };
    thread::scope(|scope| worlds(3).into_iter().for_each(|world| drop(scope.spawn(move || work(world)))));
}

/// What the others say after rank 2 of 4 did `fail`.
fn verdicts(timing: Timing, fail: impl Fn(Tcp) + Sync) -> Vec<String> {
    let started = Instant::now();
    let said = tcp(4, timing, |mut group| {
        if group.rank() == 2 {
            group.barrier().unwrap();
            fail(group);
            return None;
        }
        let mut work = || {
            group.barrier()?;
            loop {
                group.all_reduce(Numbers::F32(&mut [1.0; 100]), Order::Fastest)?;
            }
        };
        let work: &mut dyn FnMut() -> Result<()> = &mut work;
        let error = work().unwrap_err();
        Some(format!("{error:#}"))
    });
    assert!(started.elapsed() < Duration::from_secs(10));
    said.into_iter().flatten().collect()
}

#[test]
fn a_rank_that_gives_up_is_named_with_its_reason() {
    let said = verdicts(timing(), |mut group| group.abort("its disk is full"));
    assert!(
        said.len() == 3
            && said.iter().all(|s| s.starts_with("rank 2 (process ") && s.ends_with("gave up: its disk is full")),
        "{said:?}"
    );
}

#[test]
fn a_rank_that_stands_still_is_named() {
    let timing = Timing { progress: Duration::from_millis(500), ..timing() };
    let said = verdicts(timing, |group| {
        thread::sleep(Duration::from_secs(2));
        drop(group);
    });
    assert!(
        said.iter()
            .all(|s| s.starts_with("rank 2 (process ") && s.contains("made no progress while others waited for")),
        "{said:?}"
    );
}

#[test]
fn a_rank_that_leaves_early_panics_or_is_out_of_step_is_named() {
    let said = verdicts(timing(), drop);
    assert!(said.len() == 3 && said.iter().all(|s| s.contains("rank 2 broke") || s.contains("has left")), "{said:?}");

    let said = verdicts(timing(), |group| {
        let work = std::panic::AssertUnwindSafe(move || {
            let _group = group;
            panic!("on purpose");
        });
        assert!(std::panic::catch_unwind(work).is_err());
    });
    assert!(said.len() == 3 && said.iter().all(|s| s.ends_with("gave up: it panicked")), "{said:?}");

    let said = tcp(2, timing(), |mut group| {
        let one_thing = |group: &mut Tcp| group.all_reduce(Numbers::F32(&mut [1e30; 100]), Order::Fastest);
        let done = if group.rank() == 0 { one_thing(&mut group) } else { group.all_gather(&[1; 64]).map(drop) };
        format!("{:#}", done.unwrap_err())
    });
    assert!(said.iter().all(|s| s.contains("rank 0 is out of step")), "{said:?}");
}

#[test]
fn the_main_process_may_work_alone_for_longer_than_a_collective_may_take() {
    let timing = Timing { progress: Duration::from_millis(300), ..timing() };
    let work = |world: World| {
        let ranks = Communicator::new(move || Tcp::join(&world, "test", timing)).unwrap();
        let alone = || {
            thread::sleep(Duration::from_millis(800));
            Ok(ranks.rank())
        };
        let first = ranks.is_main().then(|| alone().unwrap() + 7);
        assert_eq!(ranks.from_main(first.as_ref()).unwrap(), 7);
        assert_eq!(ranks.in_turn(alone).unwrap(), ranks.rank());
        if ranks.is_main() {
            alone().unwrap();
        }
        let error = ranks.barrier().unwrap_err().to_string();
        assert!(error.contains("rank 0") && error.contains("made no progress"), "{error}");
    };
    let work = &work;
    thread::scope(|scope| worlds(2).into_iter().for_each(|world| drop(scope.spawn(move || work(world)))));
}

#[test]
fn the_exit_code_is_that_of_the_rank_that_failed_or_of_the_signal_that_was_asked_for() {
    let run = |script: &str, signal: Option<i32>| {
        let command = || {
            let mut command = std::process::Command::new("sh");
            command.args(["-c", script]);
            command
        };
        let started = Instant::now();
        let signal = || signal.filter(|_| started.elapsed() > Duration::from_millis(200));
        format!("{:?}", spawn(&Launch::local(2), command, signal).unwrap())
    };
    let code = |code: u8| format!("{:?}", std::process::ExitCode::from(code));
    assert_eq!(run("exit 0", None), code(0));
    assert_eq!(run(r"printf 'not \377 text\n' >&2; exit $((RANK * 3))", None), code(3));
    assert_eq!(run("[ $RANK = 0 ] && kill -9 $$; sleep 30", None), code(1));
    assert_eq!(run("sleep 30", Some(libc::SIGTERM)), code(143));
    // (Not SIGINT, which whoever runs this in the background may have had ignored.)
    assert_eq!(run("trap 'exit 130' TERM; sleep 30 & wait", Some(libc::SIGTERM)), code(130));
}

#[test]
fn ranks_that_do_not_belong_together_are_told() {
    let join = |world: World, job: &'static str| {
        thread::spawn(move || format!("{:#}", Tcp::join(&world, job, timing()).err().unwrap()))
    };
    let worlds_ = worlds(2);
    let said = [join(worlds_[0].clone(), "a"), join(worlds_[1].clone(), "b")].map(|rank| rank.join().unwrap());
    assert!(
        said.iter().all(|s| s.contains("has another experiment, other data or another kiln than rank 0")),
        "{said:?}"
    );

    let mut worlds_ = worlds(3);
    worlds_[2].rank = 1;
    let ranks: Vec<_> = worlds_.into_iter().map(|world| join(world, "a")).collect();
    let said: Vec<_> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
    assert!(said[0].contains("are both there"), "{said:?}");
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let timing = Timing { progress: Duration::from_millis(300), ..timing() };
    let worlds = worlds(3);
    let error = Tcp::join(&worlds[0], "a", timing).err().unwrap();
    assert!(format!("{error:#}").contains("ranks 1, 2 did not come"), "{error:#}");
    let error = Tcp::join(&worlds[1], "a", timing).err().unwrap();
    assert!(format!("{error:#}").contains("rank 0 cannot be reached"), "{error:#}");
}

#[test]
fn strangers_at_the_door_are_sent_away() {
    let worlds = worlds(2);
    let port = worlds[0].master_port;
    let stranger = thread::spawn(move || {
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(10) {
            if let Ok(mut stream) = std::net::TcpStream::connect(("127.0.0.1", port)) {
                use std::io::{Read as _, Write as _};
                let _ = stream.write_all(b"GET / HTTP/1.1\r\nHost: kiln\r\n\r\n");
                return stream.read(&mut [0; 16]).unwrap_or(0);
            }
        }
        panic!("nobody listens")
    });
    let rank_0 = {
        let world = worlds[0].clone();
        thread::spawn(move || conforms(&mut Tcp::join(&world, "a", timing()).unwrap()).unwrap())
    };
    assert_eq!(stranger.join().unwrap(), 0);
    conforms(&mut Tcp::join(&worlds[1], "a", timing()).unwrap()).unwrap();
    rank_0.join().unwrap();
}

/// What lies on GPUs is summed by NCCL, between one rank and as many as there are GPUs for; two share one
/// where NCCL_MULTI_RANK_GPU_ENABLE=1 says that it may (from NCCL 2.30 on).
#[cfg(feature = "nccl")]
#[test]
fn nccl_conforms() {
    use std::io::Write as _;

    use kiln_kernels::Buffer;

    let say = |why: &str| drop(writeln!(std::io::stderr(), "skipped: {why}"));
    let gpus = kiln_kernels::cuda_devices();
    if gpus == 0 {
        return say("no CUDA device");
    }
    let shares = std::env::var("NCCL_MULTI_RANK_GPU_ENABLE").is_ok_and(|value| value == "1");
    for world_size in [1, 2] {
        if world_size > gpus && !shares {
            say("NCCL with two ranks: one CUDA device, which NCCL_MULTI_RANK_GPU_ENABLE=1 would let them share");
            continue;
        }
        let work = |world: World| {
            let rank = world.rank;
            let mut group = Nccl::join(&world, "test", timing()).unwrap();
            conforms(&mut group).unwrap();
            let device = kiln_kernels::cuda_device(rank % gpus).unwrap();
            for len in [1, 1000, 3_000_001] {
                let value = |rank: usize, i: usize| ((rank * 7 + i * 3) % 11) as f32 - 5.0;
                let mine = (0..len + 8).map(|i| value(rank, i)).collect();
                let mut buffer = Buffer::from_vec(mine, &device).unwrap();
                let mut lent = buffer.lend(4..4 + len).unwrap();
                group.all_reduce(Numbers::from(&mut lent), Order::Fastest).unwrap();
                drop(lent);
                let sum = |i: usize| (0..world_size).map(|rank| value(rank, i)).sum::<f32>();
                let expected = |i: usize| if (4..4 + len).contains(&i) { sum(i) } else { value(rank, i) };
                let got = buffer.read(0..len + 8).unwrap();
                assert!(got.iter().enumerate().all(|(i, &x)| x == expected(i)), "rank {rank} of {world_size}: {len}");

                let mut lent = buffer.lend(0..len + 8).unwrap();
                group.broadcast(Numbers::from(&mut lent), world_size - 1).unwrap();
                drop(lent);
                let last = |i: usize| if (4..4 + len).contains(&i) { sum(i) } else { value(world_size - 1, i) };
                let got = buffer.read(0..len + 8).unwrap();
                assert!(got.iter().enumerate().all(|(i, &x)| x == last(i)), "rank {rank} of {world_size}: {len}");
            }
            let mut buffer = Buffer::zeros(8, &device).unwrap();
            let mut lent = buffer.lend(0..8).unwrap();
            assert!(group.all_reduce(Numbers::from(&mut lent), Order::Tree).is_err());
        };
        let work = &work;
        thread::scope(|scope| worlds(world_size).into_iter().for_each(|world| drop(scope.spawn(move || work(world)))));
    }
}
