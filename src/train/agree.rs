//! One state on all ranks.

use anyhow::{Result, bail};
use kiln_kernels::Buffer;
use kiln_models::nn::Parameters;
use sha2::{Digest as _, Sha256};

use super::{Optimizer, State};
use crate::config::hex;
use crate::data::Dataset;
use crate::dist::{Communicator, Numbers};

/// Puts all ranks where the main process stands, after making sure that they read the same rows.
pub(super) fn agree(
    ranks: &Communicator,
    state: State,
    parameters: &Parameters,
    optimizer: &mut Optimizer,
    parts: (&Dataset, &Dataset),
) -> Result<State> {
    if ranks.world_size() == 1 {
        return Ok(state);
    }
    let rows = |dataset: &Dataset| {
        (0..dataset.len()).fold(Sha256::new(), |hash, i| {
            let labelled = hash.chain_update(dataset.label(i).unwrap_or(u32::MAX).to_le_bytes());
            labelled.chain_update((dataset.length(i) as u64).to_le_bytes())
        })
    };
    let mine = (parameters.elements(), hex(&rows(parts.0).finalize()), hex(&rows(parts.1).finalize()));
    let all = ranks.all_gather(&mine)?;
    if let Some(rank) = all.iter().position(|other| *other != all[0]) {
        bail!("rank {rank} has other rows or another model than rank 0: give all ranks the same files");
    }
    let state = ranks.from_main(Some(&state))?;
    let from_main = |buffer: &mut Buffer| {
        let mut lent = buffer.lend(0..buffer.len())?;
        ranks.submit(move |group| group.broadcast(Numbers::from(&mut lent), 0)).wait()
    };
    from_main(&mut parameters.values_mut())?;
    if state.step > 0 {
        from_main(&mut optimizer.exp_avg)?;
        from_main(&mut optimizer.exp_avg_sq)?;
    }
    Ok(state)
}
