//! The kernel's measurements of a process.

use std::{fs, time::Duration};

/// A line of `/proc/PID/status` in its own unit (kB for memory).
pub(crate) fn status(process: u32, name: &str) -> u64 {
    number(&format!("/proc/{process}/status"), name)
}

/// Memory that this process has written to, in kB: how much of the program's file is mapped is not counted.
pub(crate) fn written_memory(process: u32) -> u64 {
    number(&format!("/proc/{process}/smaps_rollup"), "Private_Dirty:")
}

/// Open descriptors.
pub(crate) fn descriptors(process: u32) -> usize {
    fs::read_dir(format!("/proc/{process}/fd")).map_or(0, Iterator::count)
}

/// Processor time used, user and system.
pub(crate) fn processor_time(process: u32) -> Duration {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let fields = text.rsplit_once(')').map_or("", |(_, fields)| fields);
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|ticks| ticks.parse::<u64>().ok())
        .sum();
    // Linux counts in hundredths (USER_HZ) on every architecture that we run on.
    Duration::from_millis(ticks * 10)
}

/// The name of this machine's processor.
pub(crate) fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .and_then(|rest| rest.split_once(':'))
        .map(|(_, name)| name.trim().to_owned());
    model.unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

fn number(file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_whitespace().nth(1))
        .and_then(|number| number.parse().ok())
        .unwrap_or_default()
}
