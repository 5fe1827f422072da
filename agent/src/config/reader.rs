//! Typed access to one TOML table. Every mistake is collected with its place; reading goes on after it.
//!
//! A getter returns `None` for "absent" and for "wrong, and reported" alike: whoever builds a value from the fields gives up
//! when a required one is `None`, and the collected problems say why.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::problem::{Located, ProblemKind};
use crate::nearest::nearest;

/// Byte range in the text.
pub(super) type Span = Range<usize>;

/// One table being read.
pub(super) struct Reader<'t, 'i, 'p> {
    table: &'t DeTable<'i>,
    name: &'static str,
    span: Span,
    problems: &'p mut Vec<Located>,
}

impl<'t, 'i, 'p> Reader<'t, 'i, 'p> {
    /// Opens a table and reports every key that is not in `known`.
    pub(super) fn open(
        table: &'t DeTable<'i>,
        name: &'static str,
        span: Span,
        known: &[&'static str],
        problems: &'p mut Vec<Located>,
    ) -> Self {
        let mut reader = Reader { table, name, span, problems };
        for key in table.keys() {
            let text = key.get_ref().as_ref();
            if !known.contains(&text) {
                let kind = ProblemKind::UnknownKey {
                    // Escaped and cut: it is printed on a terminal.
                    key: text.chars().take(64).collect::<String>().escape_debug().to_string(),
                    table: name,
                    nearest: nearest(text, known.iter().copied()).and_then(|near| known.iter().copied().find(|k| *k == near)),
                };
                reader.report(key.span(), kind);
            }
        }
        reader
    }

    /// Adds a problem.
    pub(super) fn report(&mut self, span: Span, kind: impl Into<ProblemKind>) {
        self.problems.push(Located { span, kind: kind.into() });
    }

    /// Hands the list of problems on, to read a table inside this one.
    pub(super) fn problems(&mut self) -> &mut Vec<Located> {
        self.problems
    }

    /// The place of the table itself.
    pub(super) fn span(&self) -> Span {
        self.span.clone()
    }

    /// The raw value of `key`.
    pub(super) fn value(&self, key: &str) -> Option<&'t Spanned<DeValue<'i>>> {
        self.table.get(key)
    }

    /// Reports `key` as missing if it is; then goes on.
    pub(super) fn require(&mut self, key: &'static str, hint: &'static str) {
        if self.value(key).is_none() {
            let kind = ProblemKind::MissingKey { key, table: self.name, hint };
            self.report(self.span(), kind);
        }
    }

    /// A string.
    pub(super) fn string(&mut self, key: &'static str) -> Option<(&'t str, Span)> {
        let value = self.value(key)?;
        match value.get_ref() {
            DeValue::String(text) => Some((text.as_ref(), value.span())),
            other => {
                self.wrong_type(key, "a string", other, value.span());
                None
            }
        }
    }

    /// A string, through `parse`.
    pub(super) fn parsed<T, E: Into<ProblemKind>>(&mut self, key: &'static str, parse: impl FnOnce(&str) -> Result<T, E>) -> Option<T> {
        let (text, span) = self.string(key)?;
        parse(text).map_err(|error| self.report(span, error)).ok()
    }

    /// One string or a list of them, each through `parse`. `None` if any was wrong; an absent key is the empty list.
    pub(super) fn list<T, E: Into<ProblemKind>>(&mut self, key: &'static str, parse: impl Fn(&str) -> Result<T, E>) -> Option<Vec<T>> {
        let Some(value) = self.value(key) else {
            return Some(Vec::new());
        };
        let items: Vec<&Spanned<DeValue<'i>>> = match value.get_ref() {
            DeValue::Array(items) => items.iter().collect(),
            _ => vec![value],
        };
        let mut parsed = Vec::with_capacity(items.len());
        for item in &items {
            match item.get_ref() {
                DeValue::String(text) => match parse(text) {
                    Ok(one) => parsed.push(one),
                    Err(error) => self.report(item.span(), error),
                },
                other => self.wrong_type(key, "a string or a list of strings", other, item.span()),
            }
        }
        (parsed.len() == items.len()).then_some(parsed)
    }

    /// A whole number within `min..=max`.
    pub(super) fn number(&mut self, key: &'static str, min: u64, max: u64) -> Option<u64> {
        let value = self.value(key)?;
        let DeValue::Integer(number) = value.get_ref() else {
            self.wrong_type(key, "a whole number", value.get_ref(), value.span());
            return None;
        };
        let parsed = u64::from_str_radix(number.as_str(), number.radix()).ok();
        let within = parsed.filter(|n| (min..=max).contains(n));
        if within.is_none() {
            let kind = ProblemKind::OutOfRange {
                key,
                given: number.as_str().chars().take(24).collect(),
                min: min.to_string(),
                max: max.to_string(),
            };
            self.report(value.span(), kind);
        }
        within
    }

    /// `true` or `false`.
    pub(super) fn boolean(&mut self, key: &'static str) -> Option<bool> {
        let value = self.value(key)?;
        let DeValue::Boolean(is) = value.get_ref() else {
            self.wrong_type(key, "true or false", value.get_ref(), value.span());
            return None;
        };
        Some(*is)
    }

    /// One of a fixed set of words.
    pub(super) fn word<T>(
        &mut self,
        key: &'static str,
        allowed: &'static [&'static str],
        from_word: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        self.parsed(key, |text| {
            from_word(text).ok_or_else(|| ProblemKind::NotOneOf {
                key,
                given: text.chars().take(64).collect::<String>().escape_debug().to_string(),
                allowed,
            })
        })
    }

    /// A `[key]` table.
    pub(super) fn table(&mut self, key: &'static str) -> Option<(&'t DeTable<'i>, Span)> {
        let value = self.value(key)?;
        match value.get_ref() {
            DeValue::Table(table) => Some((table, value.span())),
            other => {
                self.wrong_type(key, "a table", other, value.span());
                None
            }
        }
    }

    /// The `[[key]]` tables, at most `max` of them.
    pub(super) fn tables(&mut self, key: &'static str, name: &'static str, max: usize) -> Vec<(&'t DeTable<'i>, Span)> {
        let Some(value) = self.value(key) else {
            return Vec::new();
        };
        let DeValue::Array(items) = value.get_ref() else {
            self.wrong_type(key, "written with double brackets", value.get_ref(), value.span());
            return Vec::new();
        };
        let mut tables = Vec::new();
        for item in items.iter().take(max) {
            match item.get_ref() {
                DeValue::Table(table) => tables.push((table, item.span())),
                other => self.wrong_type(key, "a list of tables", other, item.span()),
            }
        }
        if let Some(extra) = items.get(max) {
            self.report(extra.span(), ProblemKind::TooMany { table: name });
        }
        tables
    }

    fn wrong_type(&mut self, key: &'static str, expected: &'static str, found: &DeValue<'_>, span: Span) {
        let found = match found {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "a number",
            DeValue::Float(_) => "a fraction",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        self.report(span, ProblemKind::WrongType { key, expected, found });
    }
}
