//! Parameters: flat buffers of values and gradients in order of declaration, and the handles that
//! layers hold.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use kiln_kernels::{Buffer, DType, Device, ViewMut, init};

use super::Dropout;
use crate::{Error, Result};

/// How a parameter that no checkpoint gives starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Zeros.
    Zeros,
    /// Ones.
    Ones,
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
}

/// What a layer says of a parameter when it declares it.
struct Declared {
    name: String,
    shape: Vec<usize>,
    range: Range<usize>,
    init: Init,
    depth: usize,
    decay: bool,
    head: bool,
    frozen: AtomicBool,
    written: AtomicBool,
}

/// The buffers that all parameters of a model share.
#[derive(Default)]
struct Storage {
    values: RwLock<Buffer>,
    gradients: RwLock<Buffer>,
}

/// A handle to one parameter.
#[derive(Clone)]
pub struct Parameter {
    declared: Arc<Declared>,
    storage: Arc<Storage>,
}

impl Parameter {
    /// Its full name, as checkpoints have it.
    pub fn name(&self) -> &str {
        &self.declared.name
    }
    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.declared.shape
    }
    /// Its elements' place in the flat buffers.
    pub fn range(&self) -> Range<usize> {
        self.declared.range.clone()
    }
    /// 0 for embeddings, `i + 1` for layer `i`, one more for what stands above the layers.
    pub fn depth(&self) -> usize {
        self.declared.depth
    }
    /// Whether weight decay applies: not to biases and norms.
    pub fn decays(&self) -> bool {
        self.declared.decay
    }
    /// Whether training changes it.
    pub fn is_trainable(&self) -> bool {
        !self.declared.frozen.load(Ordering::Relaxed)
    }
    /// Excludes it from training, or includes it again.
    pub fn set_trainable(&self, trainable: bool) {
        self.declared.frozen.store(!trainable, Ordering::Relaxed);
    }
    /// Whether a backward has added to its gradient since [`Parameters::clear_written`].
    pub fn is_written(&self) -> bool {
        self.declared.written.load(Ordering::Relaxed)
    }
    /// A copy of its values, on the host.
    ///
    /// # Errors
    /// What a GPU says.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        Ok(self.values().read(self.range())?)
    }
    /// The buffer that its values lie in, at [`range`](Self::range).
    pub(super) fn values(&self) -> RwLockReadGuard<'_, Buffer> {
        read(&self.storage.values)
    }
}

/// Runs `add` on the gradients of some parameters of one model, `None` for frozen ones, and notes
/// that they were written.
pub(super) fn add_gradients<const N: usize, T>(
    parameters: [&Parameter; N],
    add: impl FnOnce([Option<ViewMut<'_>>; N]) -> candle_core::Result<T>,
) -> Result<T> {
    let ranges = parameters.map(Parameter::range);
    let mut buffer = write(&parameters[0].storage.gradients);
    let mut trainable = parameters.iter().map(|p| p.is_trainable());
    let views = buffer.views_mut(ranges)?.map(|view| trainable.next().unwrap_or(false).then_some(view));
    let result = add(views)?;
    for parameter in parameters.iter().filter(|p| p.is_trainable()) {
        parameter.declared.written.store(true, Ordering::Relaxed);
    }
    Ok(result)
}

// A panic elsewhere leaves plain numbers behind, not a broken invariant: go on with them.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}
fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Declares parameters: where in the model's tree of names the next layer stands.
pub struct Builder {
    shared: Rc<Shared>,
    prefix: String,
    depth: usize,
    head: bool,
}

struct Shared {
    parameters: RefCell<Vec<Parameter>>,
    storage: Arc<Storage>,
    elements: Cell<usize>,
    sites: Cell<u32>,
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    /// The root of a new model.
    pub fn new() -> Self {
        let shared = Shared {
            parameters: RefCell::default(),
            storage: Arc::new(Storage::default()),
            elements: Cell::new(0),
            sites: Cell::new(0),
        };
        Self { shared: Rc::new(shared), prefix: String::new(), depth: 0, head: false }
    }

    fn with(&self, prefix: String) -> Self {
        Self { shared: self.shared.clone(), prefix, depth: self.depth, head: self.head }
    }

    /// One level down the names: `bert` → `bert.encoder`.
    pub fn scope(&self, name: &str) -> Self {
        self.with(format!("{}{name}.", self.prefix))
    }

    /// Sets the depth that layer-wise learning-rate decay reads: see [`Parameter::depth`].
    pub fn depth(self, depth: usize) -> Self {
        Self { depth, ..self }
    }

    /// Marks what follows as shaped by the task's labels: another task's is not loaded but made anew.
    pub fn head(self) -> Self {
        Self { head: true, ..self }
    }

    /// Declares a parameter of this scope.
    pub(super) fn parameter(&self, name: &str, shape: &[usize], init: Init, decay: bool) -> Parameter {
        let start = self.shared.elements.get();
        let end = start + shape.iter().product::<usize>();
        self.shared.elements.set(end);
        let declared = Declared {
            name: format!("{}{name}", self.prefix),
            shape: shape.to_vec(),
            range: start..end,
            init,
            depth: self.depth,
            decay,
            head: self.head,
            frozen: AtomicBool::new(false),
            written: AtomicBool::new(false),
        };
        let parameter = Parameter { declared: Arc::new(declared), storage: self.shared.storage.clone() };
        self.shared.parameters.borrow_mut().push(parameter.clone());
        parameter
    }

    /// A dropout with a site of its own: its bits differ from every other's.
    pub fn dropout(&self, probability: f32) -> Dropout {
        let site = self.shared.sites.get();
        self.shared.sites.set(site + 1);
        Dropout { probability, site }
    }

    /// What was declared, without values.
    pub fn declared(self) -> Parameters {
        Parameters { parameters: self.shared.parameters.take(), storage: self.shared.storage.clone() }
    }

    /// Allocates the buffers on the CPU and initialises every parameter from `seed` and its place:
    /// [`Parameters::move_to`] takes them elsewhere.
    ///
    /// # Errors
    /// Memory that the device does not have.
    pub fn finish(self, seed: u64) -> Result<Parameters> {
        let Parameters { parameters, storage } = self.declared();
        let mut values = vec![0f32; parameters.last().map_or(0, |p| p.range().end)];
        for (stream, parameter) in parameters.iter().enumerate() {
            let part = &mut values[parameter.range()];
            match parameter.declared.init {
                Init::Zeros => {}
                Init::Ones => part.fill(1.0),
                Init::Normal(std) => part.copy_from_slice(&init::normal(seed, stream as u64, part.len(), std)),
            }
        }
        *write(&storage.values) = Buffer::from_vec(values, &Device::Cpu)?;
        Ok(Parameters { parameters, storage })
    }
}

/// A tensor of a checkpoint.
pub struct NamedTensor {
    /// Its shape there.
    pub shape: Vec<usize>,
    /// Its elements, row-major.
    pub data: Vec<f32>,
}

/// What loading a checkpoint found.
#[derive(Debug, Default, PartialEq)]
pub struct LoadReport {
    /// How many parameters were loaded.
    pub loaded: usize,
    /// Parameters that the checkpoint does not have, freshly initialised.
    pub new: Vec<String>,
    /// Heads that the checkpoint has for another number of labels, freshly initialised: name, its shape there.
    pub reshaped: Vec<(String, Vec<usize>)>,
    /// Tensors of the checkpoint that the model does not have.
    pub unused: Vec<String>,
}

/// All parameters of a model.
pub struct Parameters {
    parameters: Vec<Parameter>,
    storage: Arc<Storage>,
}

impl Parameters {
    /// The handles, in order of declaration.
    pub fn iter(&self) -> std::slice::Iter<'_, Parameter> {
        self.parameters.iter()
    }
    /// The number of elements of all parameters.
    pub fn elements(&self) -> usize {
        self.parameters.last().map_or(0, |p| p.range().end)
    }
    /// The flat values.
    pub fn values(&self) -> RwLockReadGuard<'_, Buffer> {
        read(&self.storage.values)
    }
    /// The flat values, to be changed.
    pub fn values_mut(&self) -> RwLockWriteGuard<'_, Buffer> {
        write(&self.storage.values)
    }
    /// The flat gradients: empty until [`allocate_gradients`](Self::allocate_gradients).
    pub fn gradients(&self) -> RwLockReadGuard<'_, Buffer> {
        read(&self.storage.gradients)
    }
    /// The flat gradients, to be changed.
    pub fn gradients_mut(&self) -> RwLockWriteGuard<'_, Buffer> {
        write(&self.storage.gradients)
    }
    /// Makes room for gradients, at zero. Training does; inference never pays for them.
    ///
    /// # Errors
    /// Memory that the device does not have.
    pub fn allocate_gradients(&self) -> Result<()> {
        *self.gradients_mut() = Buffer::zeros(self.elements(), &self.device())?;
        Ok(())
    }
    /// The device that they lie on, and that forwards compute on.
    pub fn device(&self) -> Device {
        self.values().device().clone()
    }
    /// Moves the values to `device`, where forwards then compute in `dtype`: F32, or on a GPU also BF16,
    /// for which a copy is kept beside the values, which stay f32. Gradients are to be allocated after it.
    ///
    /// # Errors
    /// Another dtype, BF16 on the CPU, or memory that the device does not have.
    pub fn move_to(&self, device: &Device, dtype: DType) -> Result<()> {
        let mut values = self.values_mut();
        let mut moved = Buffer::from_vec(values.read(0..values.len())?, device)?;
        match dtype {
            DType::F32 => {}
            DType::BF16 => moved.keep_bf16()?,
            other => return Err(Error::Input(format!("compute in {other:?} was asked for: F32 and BF16 there are"))),
        }
        *values = moved;
        *self.gradients_mut() = Buffer::default();
        Ok(())
    }
    /// Forgets which parameters a backward has written.
    pub fn clear_written(&self) {
        for parameter in &self.parameters {
            parameter.declared.written.store(false, Ordering::Relaxed);
        }
    }

    /// Loads a checkpoint: `names` are its tensors, `get` reads one. Names are tried as they are and
    /// without `base_prefix`; old TensorFlow names (`gamma`, `beta`) are read too.
    ///
    /// # Errors
    /// [`Error::Shape`] where a tensor does not fit, and what `get` returns.
    pub fn load<E: From<Error>>(
        &self,
        base_prefix: &str,
        names: &[String],
        mut get: impl FnMut(&str) -> Result<NamedTensor, E>,
    ) -> Result<LoadReport, E> {
        let mut unused: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        let mut report = LoadReport::default();
        for parameter in &self.parameters {
            let name = parameter.name();
            let short = name.strip_prefix(base_prefix).unwrap_or(name);
            let found = [name, short]
                .into_iter()
                .flat_map(|n| {
                    let norm = n.replace("LayerNorm.weight", "LayerNorm.gamma");
                    [n.to_owned(), norm.replace("LayerNorm.bias", "LayerNorm.beta")]
                })
                .find(|n| unused.contains(n.as_str()));
            let Some(found) = found else {
                report.new.push(name.to_owned());
                continue;
            };
            unused.remove(found.as_str());
            let tensor = get(&found)?;
            if tensor.shape != parameter.shape() {
                if parameter.declared.head && tensor.shape.get(1..) == parameter.shape().get(1..) {
                    report.reshaped.push((name.to_owned(), tensor.shape));
                    continue;
                }
                let (got, expected) = (tensor.shape, parameter.shape().to_vec());
                return Err(Error::Shape { name: found, got, expected }.into());
            }
            self.values_mut().write(parameter.range().start, &tensor.data).map_err(Error::from)?;
            report.loaded += 1;
        }
        report.unused = unused.into_iter().map(str::to_owned).collect();
        Ok(report)
    }
}
