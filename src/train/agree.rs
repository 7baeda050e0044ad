//! One state on all ranks.

use anyhow::{Result, bail};
use kiln_kernels::Buffer;
use kiln_models::nn::Parameters;

use super::{Optimizer, State};
use crate::config::Train;
use crate::data::Dataset;
use crate::dist::{Communicator, Numbers};

/// Puts all ranks where the main process stands, after making sure that they do the same to the same rows.
pub(super) fn agree(
    ranks: &Communicator,
    state: State,
    parameters: &Parameters,
    optimizer: &mut Optimizer,
    parts: (&Dataset, &Dataset),
    (settings, bucket_bytes): (&Train, usize),
) -> Result<State> {
    if ranks.world_size() == 1 {
        return Ok(state);
    }
    let micro_batch = (!settings.micro_batch_auto).then_some(settings.micro_batch_tokens);
    let mine: [(String, String); 8] = [
        ("parameters", parameters.elements().to_string()),
        ("a training part", parts.0.digest()),
        ("a validation part", parts.1.digest()),
        ("a device", if parameters.device().is_cpu() { "CPU" } else { "GPU" }.to_owned()),
        ("train.dtype", format!("{:?}", settings.dtype)),
        ("train.deterministic", settings.deterministic.to_string()),
        ("train.micro_batch_tokens", micro_batch.map_or("auto".to_owned(), |tokens| tokens.to_string())),
        ("train.distributed.bucket_mb, in bytes,", bucket_bytes.to_string()),
    ]
    .map(|(what, value)| (what.to_owned(), value));
    let all = ranks.all_gather(&mine)?;
    for (rank, theirs) in all.iter().enumerate() {
        if let Some(((what, got), (_, want))) = theirs.iter().zip(&all[0]).find(|(theirs, first)| theirs != first) {
            bail!(
                "rank {rank} has {what} of {got}, rank 0 of {want}: give all ranks the same kiln, files and settings"
            );
        }
    }
    let state = ranks.from_main(Some(&state))?;
    let from_main = |buffer: &mut Buffer| -> Result<()> {
        let mut lent = buffer.lend(0..buffer.len())?;
        ranks.submit(move |group| group.broadcast(Numbers::from(&mut lent), 0)).wait()?;
        Ok(buffer.refresh_bf16()?)
    };
    from_main(&mut parameters.values_mut())?;
    if state.step > 0 {
        from_main(&mut optimizer.exp_avg)?;
        from_main(&mut optimizer.exp_avg_sq)?;
    }
    Ok(state)
}
