//! Following one kind: list, watch, and again, with pauses, for ever.

use std::{fmt::Debug, pin::pin, time::Duration};

use futures_util::StreamExt as _;
use kube::{
    Api, Error as ClientError, Resource,
    runtime::watcher::{self, Config, Error, InitialListStrategy, watcher},
};
use serde::de::DeserializeOwned;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};

use crate::{
    cluster::{Event, Item},
    manifests::Kind,
};

/// First pause after something went wrong.
const RETRY_MIN: Duration = Duration::from_millis(500);

/// Longest pause: an API server that comes back is found within it, and 14 kinds that each ask once
/// in it cost nothing.
const RETRY_MAX: Duration = Duration::from_secs(20);

/// How long the API server keeps a watch open. A connection that died in silence is noticed 5 s
/// after that; a new watch costs one request.
const WATCH_S: u32 = 60;

/// A watch that says nothing for so long after trouble is well again: a connection that cannot be made
/// fails within 10 s.
const CALM: Duration = Duration::from_secs(15);

/// What to follow.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source {
    /// Which kind.
    pub(super) kind: Kind,
    /// Only those with such labels.
    pub(super) labels: Option<&'static str>,
}

/// How a list is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Listing {
    /// As the beginning of a watch: the API server holds no page of it in memory.
    Streamed,
    /// Page by page, as API servers before Kubernetes 1.34 have it.
    Paged,
}

/// What to do after an error and a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Go on: the watcher knows where it was.
    On,
    /// Begin anew, in this way.
    Anew(Listing),
}

/// Tells `events` of every object until nobody listens.
pub(super) async fn follow<K>(
    api: Api<K>,
    source: Source,
    convert: impl Fn(K) -> Item,
    events: mpsc::Sender<Event>,
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut listing = Listing::Streamed;
    let mut pause = RETRY_MIN;
    let mut troubled = false;
    loop {
        let mut stream = pin!(watcher(api.clone(), config(source, listing)));
        let mut watching = false;
        loop {
            let quiet = if troubled && watching {
                CALM
            } else {
                Duration::MAX
            };
            let Ok(next) = timeout(quiet, stream.next()).await else {
                // It goes on where it was, and nothing changed since: nobody says so.
                troubled = false;
                if events.send(Event::Well(source.kind)).await.is_err() {
                    return;
                }
                continue;
            };
            let Some(next) = next else {
                break;
            };
            let heard = match next {
                Ok(event) => {
                    watching =
                        !matches!(event, watcher::Event::Init | watcher::Event::InitApply(_));
                    if watching {
                        pause = RETRY_MIN;
                        troubled = false;
                    }
                    told(source.kind, event, &convert)
                }
                Err(error) => {
                    let next = after(&error, listing, watching);
                    let trouble = Event::Trouble(source.kind, text(&error));
                    let fell_back =
                        next == Next::Anew(Listing::Paged) && listing == Listing::Streamed;
                    if fell_back {
                        tracing::info!(kind = ?source.kind, error = %text(&error), "the API server streams no lists: asking for pages");
                    } else if events.send(trouble).await.is_err() {
                        return;
                    } else {
                        troubled = true;
                        sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
                        pause = (pause * 2).min(RETRY_MAX);
                    }
                    match next {
                        Next::On => continue,
                        Next::Anew(new) => {
                            listing = new;
                            break;
                        }
                    }
                }
            };
            for event in heard {
                if events.send(event).await.is_err() {
                    return;
                }
            }
        }
    }
}

fn config(source: Source, listing: Listing) -> Config {
    Config {
        label_selector: source.labels.map(str::to_owned),
        timeout: Some(WATCH_S),
        initial_list_strategy: match listing {
            Listing::Streamed => InitialListStrategy::StreamingList,
            Listing::Paged => InitialListStrategy::ListWatch,
        },
        ..Config::default()
    }
}

fn told<K>(kind: Kind, event: watcher::Event<K>, convert: impl Fn(K) -> Item) -> Vec<Event> {
    match event {
        watcher::Event::Init => vec![Event::ListBegins(kind)],
        watcher::Event::InitApply(object) => vec![Event::Listed(convert(object).into())],
        watcher::Event::InitDone => vec![Event::ListEnds(kind), Event::Well(kind)],
        watcher::Event::Apply(object) => {
            vec![Event::Set(convert(object).into()), Event::Well(kind)]
        }
        watcher::Event::Delete(object) => vec![Event::Gone(convert(object).id), Event::Well(kind)],
    }
}

/// What to do after `error`, by the rules of the API's watches.
fn after(error: &Error, listing: Listing, watching: bool) -> Next {
    match (code(error), error) {
        // The place in the watch is forgotten. An event says so too; the watcher knows only that.
        (Some(410), Error::WatchStartFailed(_)) => Next::Anew(listing),
        // Refused for what it is, not for who asks: without the feature, or before it existed.
        (Some(400 | 405 | 422 | 500 | 501), Error::WatchStartFailed(_) | Error::WatchError(_))
            if listing == Listing::Streamed && !watching =>
        {
            Next::Anew(Listing::Paged)
        }
        _ => Next::On,
    }
}

fn code(error: &Error) -> Option<u16> {
    match error {
        Error::WatchError(status) => Some(status.code),
        Error::InitialListFailed(ClientError::Api(status))
        | Error::WatchStartFailed(ClientError::Api(status))
        | Error::WatchFailed(ClientError::Api(status)) => Some(status.code),
        Error::InitialListFailed(_)
        | Error::WatchStartFailed(_)
        | Error::WatchFailed(_)
        | Error::NoResourceVersion => None,
    }
}

/// The cause in words. The client's own repeats itself, and prints structures.
fn text(error: &Error) -> String {
    match error {
        Error::WatchError(status) => format!("{}: {}", status.code, status.message),
        Error::InitialListFailed(error)
        | Error::WatchStartFailed(error)
        | Error::WatchFailed(error) => client_error(error),
        Error::NoResourceVersion => error.to_string(),
    }
}

/// An error of the client in words.
pub(crate) fn client_error(error: &ClientError) -> String {
    if let ClientError::Api(status) = error {
        return format!("{}: {}", status.code, status.message);
    }
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text += ": ";
            text += &said;
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn a_server_without_streamed_lists_is_asked_for_pages_from_then_on() {
        for code in [400, 405, 422, 500] {
            for error in [start(code), event(code)] {
                let next = after(&error, Listing::Streamed, false);
                assert_eq!(next, Next::Anew(Listing::Paged), "{error}");
                assert_eq!(after(&error, Listing::Paged, false), Next::On, "{error}");
            }
        }
    }

    #[test]
    fn a_server_that_is_gone_slow_or_forbids_is_asked_the_same_again() {
        for code in [401, 403, 404, 429, 503] {
            let next = after(&start(code), Listing::Streamed, false);
            assert_eq!(next, Next::On, "{code}");
        }
        // In the middle of a watch, an error says nothing of lists.
        assert_eq!(after(&event(500), Listing::Streamed, true), Next::On);
    }

    #[test]
    fn a_forgotten_place_begins_a_new_list_in_the_same_way() {
        let next = after(&start(410), Listing::Paged, true);
        assert_eq!(next, Next::Anew(Listing::Paged));
        let next = after(&start(410), Listing::Streamed, true);
        assert_eq!(next, Next::Anew(Listing::Streamed));
    }

    fn start(code: u16) -> Error {
        Error::WatchStartFailed(ClientError::Api(status(code)))
    }

    fn event(code: u16) -> Error {
        Error::WatchError(status(code))
    }

    fn status(code: u16) -> Box<Status> {
        Box::new(Status {
            status: None,
            code,
            message: "said".to_owned(),
            metadata: None,
            reason: String::new(),
            details: None,
        })
    }
}
