//! Durations as people write them: `500ms`, `90s`, `1h30m`, `2d`.
//!
//! Does not: accept a bare number (its unit would be a guess) or fractions.

use std::time::Duration;

/// Text that is no duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is no duration: write numbers with ms, s, m, h or d, as in `90s` or `1h30m`")]
pub struct BadDuration {
    /// What was given, cut to a readable length.
    pub given: String,
}

/// Milliseconds per unit; `ms` before `m` and `s`, so that the longer unit wins.
const UNITS: [(&str, u64); 5] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

/// Reads a duration: one or more numbers, each followed at once by its unit; they add up.
pub fn parse_duration(text: &str) -> Result<Duration, BadDuration> {
    read(text).map(Duration::from_millis).ok_or_else(|| BadDuration { given: text.chars().take(40).collect() })
}

fn read(text: &str) -> Option<u64> {
    let mut rest = text.trim();
    let mut total: u64 = 0;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let (unit, millis) = UNITS.iter().find(|(unit, _)| rest.starts_with(unit))?;
        rest = &rest[unit.len()..];
        total = total.checked_add(number.checked_mul(*millis)?)?;
    }
    Some(total)
}

/// Writes a duration so that [`parse_duration`] reads it back to the millisecond.
#[must_use]
pub fn duration_text(duration: Duration) -> String {
    let mut millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    if millis == 0 {
        return "0s".to_owned();
    }
    let mut text = String::new();
    for unit in ["d", "h", "m", "s", "ms"] {
        let per_unit = UNITS.iter().find(|(name, _)| *name == unit).map_or(1, |(_, millis)| *millis);
        if millis >= per_unit {
            text.push_str(&format!("{}{unit}", millis / per_unit));
            millis %= per_unit;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::{duration_text, parse_duration};

    #[test]
    fn table() {
        for (text, millis) in [
            ("0s", Some(0)),
            ("500ms", Some(500)),
            ("90s", Some(90_000)),
            ("1h30m", Some(5_400_000)),
            ("2d", Some(172_800_000)),
            (" 1m ", Some(60_000)),
            ("", None),
            ("1", None),
            ("h", None),
            ("1.5h", None),
            ("-1s", None),
            ("1 h", None),
            ("1w", None),
            ("99999999999999999999s", None),
            ("18446744073709551615d", None),
        ] {
            assert_eq!(parse_duration(text).ok(), millis.map(Duration::from_millis), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn reads_back(millis in any::<u64>()) {
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(parse_duration(&duration_text(duration)), Ok(duration));
        }
    }
}
