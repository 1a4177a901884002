//! `top`: peers, paths, rates and loss on a full screen, again and again.

use std::{
    io::{self, IsTerminal as _},
    time::{Duration, Instant},
};

use ratatui::{
    DefaultTerminal, Frame,
    crossterm::event::{self, Event, KeyCode, KeyModifiers},
    layout::{Constraint, Layout},
    style::{Color, Modifier, Style},
    text::Line,
    widgets::{Cell, Row, Table},
};

use crate::{
    Verdict,
    connect::Agent,
    failure::Failure,
    report::{Peer, Peers, Status},
    run::{self, Screen},
    show::Report as _,
    table::{bytes, duration, milliseconds, printable},
};

/// Peers whose loss is asked for at each look, the busiest: each is a question to the agent.
const LOSS_MAX: usize = 30;

/// What the screen shows.
#[derive(Debug)]
struct Look {
    status: Status,
    /// The busiest first.
    peers: Vec<Shown>,
}

/// A line of it.
#[derive(Debug, Clone, PartialEq)]
struct Shown {
    name: String,
    state: String,
    path: Option<String>,
    rtt_ms: Option<f64>,
    /// Of the path in use, from 0 to 1; `None`: not asked for.
    loss: Option<f64>,
    /// Bytes a second; `None`: at the first look.
    sent: Option<f64>,
    received: Option<f64>,
}

pub(crate) async fn top(
    agent: Agent<'_>,
    every: Duration,
    screen: Screen,
) -> Result<Verdict, Failure> {
    if screen.json || !io::stdout().is_terminal() {
        let text =
            "top needs a terminal: `meshctl peers --watch`, and --json, are for everything else";
        return Err(Failure::Refused(text.to_owned()));
    }
    // Before the screen is taken: a failure is read on the terminal as it was.
    let first = look(agent, None).await?;
    let mut terminal = ratatui::init();
    let shown = show(&mut terminal, agent, every, first).await;
    ratatui::restore();
    shown
}

async fn show(
    terminal: &mut DefaultTerminal,
    agent: Agent<'_>,
    every: Duration,
    first: (Look, Peers),
) -> Result<Verdict, Failure> {
    let cannot = |error: io::Error| Failure::Failed(format!("the terminal: {error}"));
    let (mut shown, mut before) = first;
    let mut at = Instant::now();
    loop {
        let until = Instant::now() + every;
        loop {
            terminal.draw(|frame| draw(frame, &shown)).map_err(cannot)?;
            let left = until.saturating_duration_since(Instant::now());
            if !event::poll(left).map_err(cannot)? {
                break;
            }
            if ends(&event::read().map_err(cannot)?) {
                return Ok(shown.status.verdict());
            }
        }
        (shown, before) = look(agent, Some((&before, at.elapsed()))).await?;
        at = Instant::now();
    }
}

fn ends(event: &Event) -> bool {
    // A new size is drawn.
    event.as_key_event().is_some_and(|key| {
        let interrupts = key.modifiers.contains(KeyModifiers::CONTROL);
        matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)
            || (interrupts && key.code == KeyCode::Char('c'))
    })
}

async fn look(
    agent: Agent<'_>,
    before: Option<(&Peers, Duration)>,
) -> Result<(Look, Peers), Failure> {
    let status = run::status(agent).await?;
    let peers = run::peers(agent).await?;
    let mut shown = lines(&peers, before);
    for line in shown.iter_mut().take(LOSS_MAX) {
        if line.path.is_some() {
            let why = run::path_why(agent, line.name.clone()).await?;
            let used = why.paths.iter().find(|path| path.state == "primary");
            line.loss = used.map(|path| path.loss);
        }
    }
    let look = Look {
        status,
        peers: shown,
    };
    Ok((look, peers))
}

/// The busiest first, then by name. A count that went back is a restarted agent's: no rate.
fn lines(peers: &Peers, before: Option<(&Peers, Duration)>) -> Vec<Shown> {
    let line = |peer: &Peer| {
        let rates = before.and_then(|(before, ago)| {
            let old = before.peers.iter().find(|one| one.name == peer.name)?;
            let rate = |now: u64, then: u64| {
                #[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
                let more = now.checked_sub(then)? as f64;
                Some(more / ago.as_secs_f64().max(f64::EPSILON))
            };
            Some((
                rate(peer.sent_bytes, old.sent_bytes)?,
                rate(peer.received_bytes, old.received_bytes)?,
            ))
        });
        Shown {
            name: peer.name.clone(),
            state: peer.state.clone(),
            path: peer.path.clone(),
            rtt_ms: peer.rtt_ms,
            loss: None,
            sent: rates.map(|(sent, _)| sent),
            received: rates.map(|(_, received)| received),
        }
    };
    let mut lines: Vec<_> = peers.peers.iter().map(line).collect();
    let busy = |line: &Shown| line.sent.unwrap_or_default() + line.received.unwrap_or_default();
    lines.sort_by(|a, b| {
        busy(b)
            .total_cmp(&busy(a))
            .then_with(|| a.name.cmp(&b.name))
    });
    lines
}

fn draw(frame: &mut Frame<'_>, look: &Look) {
    let rows = Constraint::Min(0);
    let areas = Layout::vertical([Constraint::Length(3), rows, Constraint::Length(1)]);
    let [head, table, foot] = areas.areas(frame.area());
    let status = &look.status;
    let relays = status.relays.iter().filter(|one| one.transport.is_some());
    let peers = status.peers.iter();
    let peers: Vec<_> = peers
        .map(|(state, count)| format!("{count} {state}"))
        .collect();
    let health = match status.verdict() {
        Verdict::Ok => Color::Green,
        Verdict::Degraded => Color::Yellow,
        Verdict::Down | Verdict::Usage => Color::Red,
    };
    let first = format!(
        "{} ({}), up {}",
        printable(&status.node),
        status.health,
        duration(status.uptime_ms / 1_000)
    );
    let problem = status.problems.first().map(|one| printable(one));
    let lines = [
        Line::styled(first, Style::new().fg(health)),
        Line::from(format!(
            "relays {} of {}   peers {}",
            relays.count(),
            status.relays.len(),
            peers.join(", ")
        )),
        Line::from(problem.unwrap_or_default()),
    ];
    frame.render_widget(ratatui::text::Text::from_iter(lines), head);
    let titles = [
        "PEER",
        "STATE",
        "PATH",
        "RTT",
        "LOSS",
        "SENT/S",
        "RECEIVED/S",
    ];
    let shown = look.peers.iter().map(row);
    let widths = [
        Constraint::Fill(2),
        Constraint::Length(11),
        Constraint::Fill(3),
        Constraint::Length(9),
        Constraint::Length(6),
        Constraint::Length(10),
        Constraint::Length(10),
    ];
    let titles = Row::new(titles).style(Style::new().add_modifier(Modifier::DIM));
    frame.render_widget(Table::new(shown, widths).header(titles), table);
    let room = usize::from(table.height.saturating_sub(1));
    let hidden = look.peers.len().saturating_sub(room);
    let more = match hidden {
        0 => "q: end".to_owned(),
        hidden => format!("q: end   {hidden} more peers: `meshctl peers`"),
    };
    frame.render_widget(Line::from(more), foot);
}

fn row(line: &Shown) -> Row<'_> {
    let rate = |rate: Option<f64>| match rate {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rate is not negative, and saturates"
        )]
        Some(rate) => bytes(rate as u64),
        None => "-".to_owned(),
    };
    let loss = match line.loss {
        Some(loss) => format!("{:.1} %", loss * 100.0),
        None => "-".to_owned(),
    };
    let colour = match line.state.as_str() {
        "direct" => Color::Green,
        "relayed" | "waking" | "suspect" => Color::Yellow,
        "unreachable" => Color::Red,
        _ => Color::Reset,
    };
    Row::new([
        Cell::from(printable(&line.name)),
        Cell::from(line.state.as_str()).style(Style::new().fg(colour)),
        Cell::from(
            line.path
                .as_deref()
                .map_or_else(|| "-".to_owned(), printable),
        ),
        Cell::from(milliseconds(line.rtt_ms)),
        Cell::from(loss),
        Cell::from(rate(line.sent)),
        Cell::from(rate(line.received)),
    ])
}

#[cfg(test)]
mod tests {
    use mesh_api::admin::{self, PeersResponse, StatusResponse};
    use ratatui::{Terminal, backend::TestBackend, crossterm::event::KeyEvent};

    use super::*;

    fn peers(counts: &[(&str, u64, u64)]) -> Peers {
        let peer = |&(name, sent_bytes, received_bytes): &(&str, u64, u64)| admin::Peer {
            name: name.to_owned(),
            state: "direct".to_owned(),
            path: "203.0.113.5:51820".to_owned(),
            rtt_ms: 41.2,
            sent_bytes,
            received_bytes,
            ..admin::Peer::default()
        };
        let peers = counts.iter().map(peer).collect();
        Peers::from(PeersResponse { peers })
    }

    fn screen(look: &Look, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, look)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let lines = buffer.content.chunks(usize::from(width)).map(|line| {
            let text: String = line.iter().map(|cell| cell.symbol()).collect();
            format!("{}\n", text.trim_end())
        });
        lines.collect()
    }

    fn status() -> Status {
        Status::from(StatusResponse {
            node: "edge-a1".to_owned(),
            health: admin::Health::Ok.into(),
            uptime_ms: 90_000,
            peers: [("direct".to_owned(), 2)].into(),
            ..StatusResponse::default()
        })
    }

    #[test]
    fn the_busiest_peers_come_first_and_rates_are_of_the_time_between() {
        let before = peers(&[("a", 0, 0), ("b", 0, 0), ("c", 9, 9)]);
        let now = peers(&[
            ("a", 2_048, 0),
            ("b", 4_096, 2_048),
            ("c", 1, 1),
            ("d", 5, 5),
        ]);
        let lines = lines(&now, Some((&before, Duration::from_secs(2))));
        let shown = lines
            .iter()
            .map(|one| (one.name.as_str(), one.sent, one.received));
        let shown: Vec<_> = shown.collect();
        let want = [
            ("b", Some(2_048.0), Some(1_024.0)),
            ("a", Some(1_024.0), Some(0.0)),
            // The agent began again; and one that was not there.
            ("c", None, None),
            ("d", None, None),
        ];
        assert_eq!(shown, want);
    }

    #[test]
    fn a_screen_has_the_node_and_a_line_for_each_peer_that_fits() {
        let before = peers(&[("edge-b1", 0, 0), ("edge-c1", 0, 0)]);
        let now = peers(&[("edge-b1", 3_072, 0), ("edge-c1", 0, 0)]);
        let mut shown = lines(&now, Some((&before, Duration::from_secs(2))));
        shown[0].loss = Some(0.015);
        let look = Look {
            status: status(),
            peers: shown,
        };
        let want = "\
edge-a1 (ok), up 1m 30s
relays 0 of 0   peers 2 direct

PEER           STATE       PATH                 RTT       LOSS   SENT/S     RECEIVED/S
edge-b1        direct      203.0.113.5:51820    41.2 ms   1.5 %  1.5 KiB    0 B
edge-c1        direct      203.0.113.5:51820    41.2 ms   -      0 B        0 B

q: end
";
        let found = screen(&look, 90, 8);
        let words = |text: &str| {
            let lines = text
                .lines()
                .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
            lines.collect::<Vec<_>>()
        };
        assert_eq!(words(&found), words(want), "{found}");
        let small = screen(&look, 90, 6);
        assert!(
            small.contains("1 more peers") && !small.contains("edge-c1"),
            "{small}"
        );
        // No room for anything is no reason to panic.
        screen(&look, 3, 1);
    }

    #[test]
    fn q_escape_and_interrupt_end_it_and_nothing_else() {
        let key = |code, modifiers| Event::Key(KeyEvent::new(code, modifiers));
        assert!(ends(&key(KeyCode::Char('q'), KeyModifiers::NONE)));
        assert!(ends(&key(KeyCode::Esc, KeyModifiers::NONE)));
        assert!(ends(&key(KeyCode::Char('c'), KeyModifiers::CONTROL)));
        assert!(!ends(&key(KeyCode::Char('c'), KeyModifiers::NONE)));
        assert!(!ends(&Event::Resize(80, 24)));
    }
}
