//! What pins the clients of a running proxy, by its metrics.

use std::net::SocketAddr;

use enum_map::EnumMap;

use super::check::Finding;
use crate::{net::http::client::request, telemetry::labels::PinReason};

/// `None` if no proxy answers, or no client of it has come to need its connection.
pub(super) async fn check(metrics: SocketAddr) -> Option<Finding> {
    let answer = request(metrics, "GET", "/metrics").await.ok()?;
    judge(&count(&answer.body))
}

/// Clients that were pinned since the start, of all endpoints.
fn count(metrics: &str) -> EnumMap<PinReason, u64> {
    let mut pins = EnumMap::<PinReason, u64>::default();
    for line in metrics.lines() {
        let Some(sample) = line.strip_prefix("lakebase_proxy_pool_pins_total{") else {
            continue;
        };
        let Some((labels, value)) = sample.rsplit_once("} ") else {
            continue;
        };
        for (reason, count) in &mut pins {
            let label = format!("reason=\"{}\"", reason.as_str());
            if labels.split(',').any(|it| it == label) {
                *count += value.parse::<u64>().unwrap_or_default();
            }
        }
    }
    pins
}

fn judge(pins: &EnumMap<PinReason, u64>) -> Option<Finding> {
    let mut found: Vec<(PinReason, u64)> = pins.iter().map(|(it, count)| (it, *count)).collect();
    found.retain(|(_, count)| *count > 0);
    found.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let (most, _) = found.first()?;
    let listed: Vec<String> = found
        .iter()
        .map(|(reason, count)| format!("{} {count}", reason.as_str()))
        .collect();
    let message = format!(
        "clients of the running proxy keep their connections of the pool, by reason: {}",
        listed.join(", ")
    );
    Some(Finding::warning(message).fix(most.advice()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_of_all_endpoints_are_counted_and_the_most_frequent_one_has_advice() {
        let metrics = "# TYPE lakebase_proxy_pool_pins_total counter\n\
            lakebase_proxy_pool_pins_total{endpoint=\"a\",reason=\"listen\"} 2\n\
            lakebase_proxy_pool_pins_total{endpoint=\"b\",reason=\"listen\"} 1\n\
            lakebase_proxy_pool_pins_total{endpoint=\"b\",reason=\"temp\"} 7\n\
            lakebase_proxy_pool_pins_total{endpoint=\"b\",reason=\"load\"} 0\n\
            lakebase_proxy_pool_refused_pins_total{endpoint=\"b\",reason=\"role\"} 9\n";
        let finding = judge(&count(metrics)).unwrap();
        assert!(
            finding.message.ends_with(": temp 7, listen 3"),
            "{}",
            finding.message
        );
        assert_eq!(finding.fix.as_deref(), Some(PinReason::Temp.advice()));
        assert!(judge(&count("")).is_none());
    }
}
