//! Suggestions for misspelled names.

/// A lower similarity is no misspelling. Measure and threshold are those that clap has for flags, so that keys and variables are
/// treated alike.
const SIMILAR: f64 = 0.7;

/// The candidate most similar to `name`, if any is similar.
pub(crate) fn most_similar(
    name: &str,
    candidates: impl IntoIterator<Item = String>,
) -> Option<String> {
    let rated = candidates
        .into_iter()
        .map(|candidate| (strsim::jaro(name, &candidate), candidate));
    let similar = rated.filter(|(rate, _)| *rate > SIMILAR);
    let best = similar.max_by(|(one, _), (other, _)| one.total_cmp(other));
    best.map(|(_, candidate)| candidate)
}
