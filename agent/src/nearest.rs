//! "Did you mean": the known name closest to a mistyped one.
//!
//! Does not suggest at any price: a far-fetched suggestion misleads more than none.

/// The candidate most like `given`, if one is like it at all. Case is ignored; at most a third of the letters may differ.
#[must_use]
pub fn nearest<'c>(given: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<&'c str> {
    // Names are short; a pasted paragraph would only make the quadratic comparison slow.
    const GIVEN_BYTES_MAX: usize = 64;
    if given.len() > GIVEN_BYTES_MAX {
        return None;
    }
    let given = given.to_lowercase();
    let edits_max = (given.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&given, candidate), candidate))
        .filter(|(edits, _)| *edits <= edits_max)
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn suggests_only_what_is_close() {
        let keys = ["name", "root", "layout", "role"];
        assert_eq!(nearest("rooot", keys), Some("root"));
        assert_eq!(nearest("Root", keys), Some("root"));
        assert_eq!(nearest("layuot", keys), Some("layout"));
        assert_eq!(nearest("compression", keys), None);
        assert_eq!(nearest(&"root".repeat(100), keys), None);
    }
}
