//! The figures that are held, as they stand in the repository.

use std::{collections::BTreeMap, path::Path};

use serde::{Deserialize, Serialize};

/// Something counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Figure {
    /// In the allocator, by one round trip.
    Allocations,
    /// In user space, by one round trip.
    Instructions,
    /// The same with a pool in mode `auto`, and no client that waits.
    InstructionsOfPool,
    /// Of one session that does nothing.
    Memory,
    /// Of one client that has given its server connection back to the pool.
    MemoryAtRest,
    /// All of the process's, while it has no session.
    Resident,
    /// By one round trip.
    SystemCalls,
}

/// All that is on record.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(crate) struct Record {
    allocations: Option<f64>,
    memory_kb: Option<f64>,
    system_calls: Option<f64>,
    /// By CPU model.
    #[serde(default)]
    instructions: BTreeMap<String, f64>,
    #[serde(default)]
    instructions_of_pool: BTreeMap<String, f64>,
}

impl Record {
    pub(crate) fn read(file: &Path) -> Self {
        match std::fs::read_to_string(file) {
            Ok(text) => {
                toml::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
            }
            Err(_) => Self::default(),
        }
    }

    pub(crate) fn write(&self, file: &Path) {
        let text = toml::to_string(self).expect("numbers and names");
        let head = "# What `cargo test --test exact` holds the proxy to; renewed by `cargo test --test exact -- --renew`.\n";
        std::fs::write(file, format!("{head}{text}")).expect("the record can be written");
    }

    pub(crate) fn knows(&self, model: &str) -> bool {
        self.instructions.contains_key(model)
    }

    pub(crate) fn get(&self, figure: Figure, model: &str) -> Option<f64> {
        match figure {
            Figure::Allocations => self.allocations,
            Figure::Instructions => self.instructions.get(model).copied(),
            Figure::InstructionsOfPool => self.instructions_of_pool.get(model).copied(),
            Figure::Memory => self.memory_kb,
            // Counted in pages, repeated counts differ by more than the tolerance.
            Figure::MemoryAtRest | Figure::Resident => None,
            Figure::SystemCalls => self.system_calls,
        }
    }

    pub(crate) fn set(&mut self, figure: Figure, model: &str, value: f64) {
        let value = (value * 100.0).round() / 100.0;
        match figure {
            Figure::Allocations => self.allocations = Some(value),
            Figure::Instructions => drop(self.instructions.insert(model.to_owned(), value)),
            Figure::InstructionsOfPool => {
                self.instructions_of_pool.insert(model.to_owned(), value);
            }
            Figure::Memory => self.memory_kb = Some(value),
            Figure::MemoryAtRest | Figure::Resident => {}
            Figure::SystemCalls => self.system_calls = Some(value),
        }
    }
}
