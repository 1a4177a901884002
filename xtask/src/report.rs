//! Tables, and durations for people.

use std::time::Duration;

use comfy_table::{ContentArrangement, Table, presets::UTF8_HORIZONTAL_ONLY};

/// Columns of a table at most: it fits a terminal beside an editor, and a CI log.
const WIDTH: u16 = 110;

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
