//! A picture of a run: a panel a metric, a bar a case, a line from the lowest to the highest round.

use std::fmt::Write as _;

use super::Figure;

/// What is drawn: metric, title, and what the figures are divided by.
const PANELS: &[(&str, &str, f64)] = &[
    ("tcp_1", "TCP, 1 stream: Gb/s", 1e3),
    ("tcp_4", "TCP, 4 streams: Gb/s", 1e3),
    ("tcp_16", "TCP, 16 streams: Gb/s", 1e3),
    ("connect_p50", "connect, median: µs", 1.0),
    ("connect_p99", "connect, 99 %: µs", 1.0),
    ("first_byte_p50", "first byte, median: µs", 1.0),
    ("first_byte_p99", "first byte, 99 %: µs", 1.0),
    ("udp_64", "UDP 64 B without loss: thousand a second", 1.0),
    (
        "udp_1200",
        "UDP 1,200 B without loss: thousand a second",
        1.0,
    ),
    ("cpu_per_gb", "processor time, all ends: s per GB", 1.0),
    ("rtt_p50", "round trip, idle, median: µs", 1.0),
    ("rtt_p99", "round trip, idle, 99 %: µs", 1.0),
    ("rtt_p999", "round trip, idle, 99.9 %: µs", 1.0),
    (
        "udp_p50",
        "UDP question and answer, new socket, median: µs",
        1.0,
    ),
    (
        "udp_p99",
        "UDP question and answer, new socket, 99 %: µs",
        1.0,
    ),
    (
        "loaded_rtt_p50",
        "round trip beside a bulk flow, median: µs",
        1.0,
    ),
    (
        "loaded_rtt_p99",
        "round trip beside a bulk flow, 99 %: µs",
        1.0,
    ),
    ("resident_peak", "resident memory, highest: MiB", 1024.0),
    (
        "resident_per_peer",
        "resident memory of a further idle peer: KiB",
        1.0,
    ),
    ("hub_out", "TCP, to two peers at once: Gb/s", 1e3),
    ("hub_in", "TCP, from two peers at once: Gb/s", 1e3),
    ("load", "all services, from nothing to the kernel: ms", 1.0),
];

const COLUMNS: usize = 3;
const PANEL_WIDTH: usize = 400;
/// Room for the subtitle, and below each panel.
const TOP: usize = 40;
const GAP: usize = 16;
const TITLE_HEIGHT: usize = 30;
const ROW_HEIGHT: usize = 17;
/// Where bars begin, and their longest.
const BARS_X: f64 = 150.0;
const BARS_WIDTH: f64 = 190.0;

/// Room for decimal logarithms: a bar of 1/1000 of the longest has no length left.
const DECADES: f64 = 3.0;

/// The picture as SVG. Lengths are logarithms: the cases lie up to a thousandfold apart.
pub(super) fn svg(figures: &[Figure], subtitle: &str) -> String {
    let panels: Vec<_> = PANELS
        .iter()
        .map(|(metric, title, divisor)| {
            let rows = figures.iter().filter(|figure| figure.metric == *metric);
            let mut rows: Vec<_> = rows.collect();
            // A figure with two numbers to hold is there twice.
            rows.dedup_by_key(|figure| &figure.case);
            (title, *divisor, rows)
        })
        .filter(|(_, _, rows)| !rows.is_empty())
        .collect();
    // Panels side by side are as high as the one with most cases.
    let heights = panels.chunks(COLUMNS).map(|beside| {
        let most = beside.iter().map(|(_, _, rows)| rows.len()).max();
        TITLE_HEIGHT + most.unwrap_or(0) * ROW_HEIGHT + GAP
    });
    let heights: Vec<_> = heights.collect();
    let (width, height) = (COLUMNS * PANEL_WIDTH, TOP + heights.iter().sum::<usize>());
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"12\" y=\"24\" fill=\"#555\">{}</text>\n",
        escape(subtitle)
    );
    for (index, (title, divisor, rows)) in panels.iter().enumerate() {
        let above = heights.iter().take(index / COLUMNS);
        let (x, y) = (index % COLUMNS * PANEL_WIDTH, TOP + above.sum::<usize>());
        writeln!(svg, "<g transform=\"translate({x},{y})\">").ok();
        writeln!(
            svg,
            "<text x=\"12\" y=\"18\" font-weight=\"bold\">{title}</text>"
        )
        .ok();
        panel(&mut svg, rows, *divisor);
        svg.push_str("</g>\n");
    }
    svg.push_str("</svg>\n");
    svg
}

fn panel(svg: &mut String, rows: &[&Figure], divisor: f64) {
    let longest = rows.iter().map(|figure| figure.max).fold(0.0, f64::max);
    let length = |value: f64| BARS_WIDTH * (1.0 + (value / longest).log10() / DECADES).max(0.0);
    for (row, figure) in rows.iter().enumerate() {
        let y = TITLE_HEIGHT + row * ROW_HEIGHT;
        let (text, middle) = (y + 9, y + 6);
        let colour = colour(&figure.case);
        let [bar, from, to] = [figure.median, figure.min, figure.max].map(length);
        let (from, to) = (BARS_X + from, BARS_X + to);
        let (label, value) = (BARS_X - 6.0, to + 5.0);
        let said = figure.median_text(divisor);
        let case = escape(&figure.case);
        writeln!(
            svg,
            "<text x=\"{label}\" y=\"{text}\" text-anchor=\"end\">{case}</text>\
             <rect x=\"{BARS_X}\" y=\"{y}\" width=\"{bar:.1}\" height=\"12\" fill=\"{colour}\"/>\
             <path d=\"M{from:.1} {middle}H{to:.1}\" stroke=\"#000\"/>\
             <text x=\"{value:.1}\" y=\"{text}\">{said}</text>"
        )
        .ok();
    }
}

/// What is without any of them grey, ours green, the others blue.
fn colour(case: &str) -> &'static str {
    match case {
        "raw" | "direct" | "direct-again" => "#bbb",
        _ if super::tunnel::is_peer(case) || super::services::is_other(case) => "#8ab4d8",
        _ => "#4c9f70",
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::super::Samples;
    use super::*;

    #[test]
    fn every_case_has_a_bar_and_its_number() {
        let mut samples = Samples::default();
        for (case, value) in [("raw", 30_000.0), ("holdfast", 4_000.0), ("tinc", 500.0)] {
            samples.add(case, "tcp_1", "Mb/s", value);
            samples.add(case, "rtt_p50", "µs", value);
        }
        let drawn = svg(&samples.figures("tunnel"), "a < b & c");
        assert_eq!(drawn.matches("<g ").count(), 2);
        assert_eq!(drawn.matches("<rect x").count(), 6);
        assert!(drawn.contains(">holdfast</text>") && drawn.contains(">4.00</text>"));
        assert!(drawn.contains("a &lt; b &amp; c"));
    }

    #[test]
    fn the_longest_bar_is_full_and_a_tenth_a_third_shorter() {
        let mut samples = Samples::default();
        samples.add("raw", "tcp_1", "Mb/s", 1_000.0);
        samples.add("tinc", "tcp_1", "Mb/s", 100.0);
        let drawn = svg(&samples.figures("tunnel"), "");
        let widths = ["190.0", "126.7"].map(|width| drawn.contains(&format!("width=\"{width}\"")));
        assert_eq!(widths, [true, true], "{drawn}");
    }

    #[test]
    fn of_services_the_direct_way_is_grey_ours_green_and_kube_proxys_blue() {
        let mut samples = Samples::default();
        for case in ["direct", "holdfast-packets-10000", "iptables-10000"] {
            samples.add(case, "connect_p50", "µs", 30.0);
        }
        let drawn = svg(&samples.figures("services"), "");
        for colour in ["#bbb", "#4c9f70", "#8ab4d8"] {
            let bars = drawn.matches(&format!("fill=\"{colour}\"")).count();
            assert_eq!(bars, 1, "{colour}: {drawn}");
        }
    }

    #[test]
    fn a_row_of_panels_is_as_high_as_its_fullest() {
        let mut samples = Samples::default();
        for metric in ["tcp_1", "tcp_4", "tcp_16"] {
            samples.add("raw", metric, "Mb/s", 1.0);
            samples.add("tinc", metric, "Mb/s", 1.0);
        }
        samples.add("raw", "hub_out", "Mb/s", 1.0);
        let drawn = svg(&samples.figures("tunnel"), "");
        let second = TOP + TITLE_HEIGHT + 2 * ROW_HEIGHT + GAP;
        assert!(drawn.contains(&format!("translate(0,{second})")), "{drawn}");
        let height = second + TITLE_HEIGHT + ROW_HEIGHT + GAP;
        assert!(drawn.contains(&format!("height=\"{height}\"")), "{drawn}");
    }

    #[test]
    fn nothing_measured_is_an_empty_picture() {
        assert!(!svg(&[], "").contains("<g "));
    }
}
