// SPDX-License-Identifier: BSD-3-Clause
//! What `INFO` prints, looked up by name.

use std::collections::HashMap;

use anyhow::{Context, Result};

/// One answer to `INFO`.
pub struct Info(HashMap<String, String>);

impl Info {
    /// Reads the answer's text.
    pub fn parse(text: &str) -> Self {
        Self(
            text.lines()
                .filter_map(|line| line.split_once(':'))
                .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
                .collect(),
        )
    }

    /// A field as text.
    pub fn text(&self, name: &str) -> Result<&str> {
        self.0.get(name).map(String::as_str).with_context(|| format!("INFO has no field '{name}'"))
    }

    /// A field as a number.
    pub fn number(&self, name: &str) -> Result<u64> {
        let text = self.text(name)?;
        text.parse().with_context(|| format!("INFO field {name} is '{text}', not a number"))
    }

    /// The fields whose names begin so.
    pub fn all(&self, start: &str) -> impl Iterator<Item = (&str, &str)> {
        let fields = self.0.iter().filter(move |(name, _)| name.starts_with(start));
        fields.map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The sum of several fields.
    pub fn sum(&self, names: &[&str]) -> Result<u64> {
        names.iter().map(|name| self.number(name)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_name() {
        let info = Info::parse("# Server\r\nhz:10\r\nversion:8.0.1\r\nempty:\r\nb:5\r\n");
        assert_eq!(info.number("hz").unwrap(), 10);
        assert_eq!(info.text("version").unwrap(), "8.0.1");
        assert_eq!(info.sum(&["hz", "b"]).unwrap(), 15);
        assert!(info.number("version").is_err());
        assert!(info.number("missing").is_err());
    }
}
