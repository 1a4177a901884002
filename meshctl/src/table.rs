//! Text in columns, in colours if there is somebody to see them.

use std::fmt::Write as _;

/// How a cell is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Plain,
    Good,
    Warning,
    Bad,
    Faint,
}

/// One cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    pub(crate) fn new(text: impl AsRef<str>, tone: Tone) -> Self {
        Self {
            text: printable(text.as_ref()),
            tone,
        }
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text, Tone::Plain)
    }
}

/// `text` without what a terminal would obey: names and records come from elsewhere.
pub(crate) fn printable(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

/// Rows under each other, two spaces between columns, nothing at a line's end.
pub(crate) fn columns(rows: &[Vec<Cell>], colours: bool) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        for (index, cell) in row.iter().enumerate() {
            let width = cell.text.chars().count();
            match widths.get_mut(index) {
                Some(widest) => *widest = width.max(*widest),
                None => widths.push(width),
            }
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut pending = 0;
        for (cell, width) in row.iter().zip(&widths) {
            pending += if cell.text.is_empty() {
                width + 2
            } else {
                text.extend(std::iter::repeat_n(' ', pending));
                paint(&mut text, cell, colours);
                pending = 0;
                width - cell.text.chars().count() + 2
            };
        }
        text.push('\n');
    }
    text
}

/// A table with a head; that there is nothing to show is said, too.
pub(crate) fn table(head: &[&str], rows: Vec<Vec<Cell>>, colours: bool) -> String {
    let head = head.iter().map(|title| Cell::new(title, Tone::Faint));
    let mut all = vec![head.collect()];
    if rows.is_empty() {
        all.push(vec![Cell::new("none", Tone::Faint)]);
    }
    all.extend(rows);
    columns(&all, colours)
}

fn paint(text: &mut String, cell: &Cell, colours: bool) {
    let code = match cell.tone {
        Tone::Plain => None,
        Tone::Good => Some(32),
        Tone::Warning => Some(33),
        Tone::Bad => Some(31),
        Tone::Faint => Some(2),
    };
    match code.filter(|_| colours) {
        // Writing to a String cannot fail.
        Some(code) => write!(text, "\u{1b}[{code}m{}\u{1b}[0m", cell.text).unwrap_or_default(),
        None => text.push_str(&cell.text),
    }
}

/// `12.3 ms`; a dash if it was not measured.
pub(crate) fn milliseconds(ms: Option<f64>) -> String {
    match ms {
        Some(ms) if ms < 10.0 => format!("{ms:.2} ms"),
        Some(ms) => format!("{ms:.1} ms"),
        None => "-".to_owned(),
    }
}

/// `3d 4h`: the two largest units.
pub(crate) fn duration(total_s: u64) -> String {
    let parts = [
        (total_s / 86_400, "d"),
        (total_s / 3600 % 24, "h"),
        (total_s / 60 % 60, "m"),
        (total_s % 60, "s"),
    ];
    let first = parts.iter().position(|(count, _)| *count > 0).unwrap_or(3);
    let shown = parts
        .iter()
        .skip(first)
        .take(2)
        .filter(|(count, _)| *count > 0);
    let shown: Vec<_> = shown
        .map(|(count, unit)| format!("{count}{unit}"))
        .collect();
    if shown.is_empty() {
        "0s".to_owned()
    } else {
        shown.join(" ")
    }
}

/// `1.2 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let exponent = (count.ilog2() / 10).clamp(1, 5);
    #[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
    let scaled = count as f64 / (1_u64 << (10 * exponent)) as f64;
    let unit = UNITS.get(exponent as usize - 1).unwrap_or(&"PiB");
    format!("{scaled:.1} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_nothing_says_so() {
        assert_eq!(
            table(&["NODE", "SITE"], Vec::new(), false),
            "NODE  SITE\nnone\n"
        );
    }

    #[test]
    fn columns_line_up_with_and_without_colours() {
        let rows = vec![
            vec![
                Cell::from("edge-a1"),
                Cell::new("direct", Tone::Good),
                Cell::from(""),
            ],
            vec![Cell::from("b"), Cell::from(""), Cell::from("x")],
        ];
        let plain = "NAME     STATE   PATH\nedge-a1  direct\nb                x\n";
        let head = ["NAME", "STATE", "PATH"];
        assert_eq!(table(&head, rows.clone(), false), plain);
        let coloured = table(&head, rows, true);
        assert!(coloured.contains("\u{1b}[32mdirect\u{1b}[0m\n"));
        let mut stripped = coloured.replace("\u{1b}[0m", "");
        for code in [2, 32] {
            stripped = stripped.replace(&format!("\u{1b}[{code}m"), "");
        }
        assert_eq!(stripped, plain);
    }

    #[test]
    fn a_name_cannot_command_the_terminal() {
        assert_eq!(
            Cell::from("\u{1b}[2Jevil\n"),
            Cell::from("\u{fffd}[2Jevil\u{fffd}")
        );
    }

    #[test]
    fn numbers_are_shown_as_people_say_them() {
        for (seconds, want) in [
            (0, "0s"),
            (59, "59s"),
            (3600, "1h"),
            (3661, "1h 1m"),
            (90_000, "1d 1h"),
            (86_400 + 5, "1d"),
        ] {
            assert_eq!(duration(seconds), want);
        }
        for (count, want) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (5 << 30, "5.0 GiB"),
            (u64::MAX, "16384.0 PiB"),
        ] {
            assert_eq!(bytes(count), want);
        }
        assert_eq!(milliseconds(Some(1.234)), "1.23 ms");
        assert_eq!(milliseconds(Some(23.45)), "23.4 ms");
        assert_eq!(milliseconds(None), "-");
    }
}
