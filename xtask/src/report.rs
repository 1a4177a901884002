//! Tables, and durations for people.

use std::time::Duration;

use comfy_table::{ContentArrangement, Table, presets::UTF8_HORIZONTAL_ONLY};

/// Columns of a table at most: it fits a wide terminal, and a CI log.
const WIDTH: u16 = 134;

/// A table with plain horizontal lines.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table
        .load_preset(UTF8_HORIZONTAL_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(WIDTH)
        .set_header(header.iter().copied());
    table.add_rows(rows);
    table.to_string()
}

/// `2.4 s`, or `340 ms`.
pub(crate) fn took(time: Duration) -> String {
    if time < Duration::from_secs(1) {
        return format!("{} ms", time.as_millis());
    }
    format!("{:.1} s", time.as_secs_f64())
}

/// `12.3`, `0.380`, `4568`: as many digits as a measurement is worth, or the whole number.
pub(crate) fn three_digits(value: f64) -> String {
    match value.abs() {
        size if size >= 99.95 || size == 0.0 => format!("{value:.0}"),
        size if size >= 9.995 => format!("{value:.1}"),
        size if size >= 0.9995 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_or_are_whole() {
        let texts = [4_567.8, 99.96, 12.34, 1.0, 0.38, 0.0].map(three_digits);
        assert_eq!(texts, ["4568", "100", "12.3", "1.00", "0.380", "0"]);
    }
}
