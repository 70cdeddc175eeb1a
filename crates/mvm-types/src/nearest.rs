//! "Did you mean": the nearest known name.

/// Returns the known name that `given` most likely means, if one is near enough to suggest.
///
/// Near enough is a Damerau-Levenshtein distance of at most a third of the longer name, and at least one.
pub fn nearest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Distances are quadratic: hostile input of 10 kB is not worth a suggestion.
    if given.len() > 64 {
        return None;
    }
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(given, name), name))
        .filter(|(distance, name)| *distance <= (name.len().max(given.len()) / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn suggests_the_nearest_and_only_if_it_is_near() {
        let known = ["gateway", "builder", "worker"];
        assert_eq!(nearest("gatewy", known), Some("gateway"));
        assert_eq!(nearest("wroker", known), Some("worker"));
        assert_eq!(nearest("database", known), None);
        assert_eq!(nearest(&"g".repeat(10_000), known), None);
    }
}
