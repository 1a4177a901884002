//! Out through an HTTP proxy: CONNECT (RFC 9110 §9.3.6), with a name and a password where the proxy asks for
//! them (Basic, RFC 7617). Which one, and for whom not, says the configuration, or the environment as
//! other programs read it.
//!
//! Own code, as the crates for it (hyper-util's `Tunnel`, reqwest) do not tell an operator what the proxy
//! said: of "407" and "403" they make one and the same "unsuccessful".

use std::{env, fmt, io, net::IpAddr, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use ipnet::IpNet;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// Longest time for the TCP connection to the proxy and its answer, which has to wait for a connection of
/// its own: a lost SYN (1 s), and some round trips. Whoever wants a link to a relay waits 3 s for it, and
/// is to hear of the proxy before that.
pub const ANSWER_TIMEOUT: Duration = Duration::from_millis(2_500);

/// Longest head of an answer: what proxies and servers take (nginx, Apache).
const HEAD_BYTES_MAX: usize = 8 << 10;

/// Most characters of what a proxy says that are passed on to people.
const SAID_CHARS_MAX: usize = 100;

/// Where programs look, the first one first.
const PROXY_VARIABLES: [&str; 2] = ["https_proxy", "HTTPS_PROXY"];
const EXCEPTION_VARIABLES: [&str; 2] = ["no_proxy", "NO_PROXY"];

/// A proxy, and for whom it is not. Shown without its password.
#[derive(Clone, PartialEq, Eq)]
pub struct HttpProxy {
    address: String,
    /// `Basic …`.
    authorization: Option<String>,
    exceptions: Vec<Exception>,
}

/// For whom a proxy is not.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Exception {
    All,
    Net(IpNet),
    /// A name, and all names below it.
    Name(String),
}

/// Why there is no way through a proxy.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// It cannot be reached.
    #[error("cannot reach the proxy {proxy}: {source}")]
    Unreachable {
        /// `host:port`.
        proxy: String,
        /// Why.
        source: io::Error,
    },
    /// It says nothing.
    #[error("the proxy {proxy} did not answer CONNECT {target} in {ANSWER_TIMEOUT:?}")]
    Silent {
        /// `host:port`.
        proxy: String,
        /// Who was to be reached.
        target: String,
    },
    /// It wants to know who we are.
    #[error("the proxy {proxy} {}: set `https_proxy = \"http://name:password@{proxy}\"`",
        if *.tried { "does not accept the name and password that it was given" } else { "asks for a name and a password" })]
    WhoAreYou {
        /// `host:port`.
        proxy: String,
        /// A name and a password were given.
        tried: bool,
    },
    /// It does not let us through.
    #[error("the proxy {proxy} refused CONNECT {target}: {said}")]
    Refused {
        /// `host:port`.
        proxy: String,
        /// Who was to be reached.
        target: String,
        /// Its status line.
        said: String,
    },
    /// It is no proxy.
    #[error("{proxy} does not answer as an HTTP proxy does: {problem}")]
    Garbled {
        /// `host:port`.
        proxy: String,
        /// What is wrong.
        problem: String,
    },
}

impl fmt::Debug for HttpProxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpProxy")
            .field("address", &self.address)
            .field("authorization", &self.authorization.as_ref().map(|_| "…"))
            .field("exceptions", &self.exceptions)
            .finish()
    }
}

impl HttpProxy {
    /// What the configuration says, or where it says nothing the environment (`HTTPS_PROXY`, `NO_PROXY`).
    /// An empty address is no proxy.
    ///
    /// # Errors
    ///
    /// What is wrong with which of the two. Passwords are not repeated.
    pub fn choose(
        written: Option<&str>,
        written_exceptions: Option<&[String]>,
    ) -> Result<Option<Self>, String> {
        let variable = |names: [&str; 2]| names.iter().find_map(|name| env::var(name).ok());
        let address = match written {
            Some(address) => Some(address.to_owned()),
            None => variable(PROXY_VARIABLES),
        };
        let Some(address) = address.filter(|address| !address.trim().is_empty()) else {
            return Ok(None);
        };
        let exceptions = match written_exceptions {
            Some(exceptions) => exceptions.to_vec(),
            None => {
                let text = variable(EXCEPTION_VARIABLES).unwrap_or_default();
                text.split(',').map(str::to_owned).collect()
            }
        };
        Self::parse(address.trim(), &exceptions).map(Some)
    }

    /// Reads `http://name:password@host:port`, in which name and password may be percent-encoded; without
    /// a port it is 3128's customary one for `http` proxies. `exceptions`: addresses, prefixes, names
    /// (which stand for all below them, too), or `*`.
    ///
    /// # Errors
    ///
    /// What is wrong. Passwords are not repeated.
    pub fn parse(url: &str, exceptions: &[String]) -> Result<Self, String> {
        let rest = match url.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
            Some((scheme, _)) => {
                return Err(format!(
                    "a proxy by {scheme:?}: only http:// is spoken with proxies"
                ));
            }
            None => url,
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (user, address) = match rest.rsplit_once('@') {
            Some((user, address)) => (Some(user), address),
            None => (None, rest),
        };
        let authorization = user.map(|user| {
            let (name, password) = user.split_once(':').unwrap_or((user, ""));
            let bytes = [percent_decoded(name), percent_decoded(password)].join(&b':');
            format!("Basic {}", BASE64_STANDARD.encode(bytes))
        });
        Ok(Self {
            address: with_port(address)?,
            authorization,
            exceptions: exceptions
                .iter()
                .filter_map(|text| exception(text))
                .collect(),
        })
    }

    /// Its `host:port`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whether `host` (a name, or an address) is to be reached through it.
    #[must_use]
    pub fn is_for(&self, host: &str) -> bool {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let address: Option<IpAddr> = host.parse().ok();
        let excepted = |exception: &Exception| match exception {
            Exception::All => true,
            Exception::Net(net) => address.is_some_and(|ip| net.contains(&ip)),
            Exception::Name(name) => {
                let host = host.to_ascii_lowercase();
                let above = host.strip_suffix(name.as_str());
                above.is_some_and(|above| above.is_empty() || above.ends_with('.'))
            }
        };
        !self.exceptions.iter().any(excepted)
    }

    /// Makes `connecting`, a connection to [`Self::address`], one to `target` (`host:port`).
    ///
    /// # Errors
    ///
    /// [`ProxyError`].
    pub async fn through(
        &self,
        connecting: impl Future<Output = io::Result<TcpStream>>,
        target: &str,
    ) -> Result<TcpStream, ProxyError> {
        let work = async {
            let mut stream = connecting
                .await
                .map_err(|source| self.unreachable(source))?;
            self.ask(&mut stream, target).await?;
            Ok(stream)
        };
        let late = |_| ProxyError::Silent {
            proxy: self.address.clone(),
            target: target.to_owned(),
        };
        timeout(ANSWER_TIMEOUT, work).await.map_err(late)?
    }

    fn unreachable(&self, source: io::Error) -> ProxyError {
        ProxyError::Unreachable {
            proxy: self.address.clone(),
            source,
        }
    }

    fn garbled(&self, problem: impl Into<String>) -> ProxyError {
        ProxyError::Garbled {
            proxy: self.address.clone(),
            problem: problem.into(),
        }
    }

    async fn ask(&self, stream: &mut TcpStream, target: &str) -> Result<(), ProxyError> {
        let mut request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n");
        if let Some(authorization) = &self.authorization {
            request += &format!("Proxy-Authorization: {authorization}\r\n");
        }
        request += "\r\n";
        let written = stream.write_all(request.as_bytes()).await;
        written.map_err(|source| self.unreachable(source))?;
        let mut head = Vec::new();
        // Behind the head nothing comes before this side has spoken: TLS begins with the client.
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() == HEAD_BYTES_MAX {
                return Err(self.garbled(format!("more than {HEAD_BYTES_MAX} bytes of headers")));
            }
            let byte = stream.read_u8().await.map_err(|error| {
                if error.kind() != io::ErrorKind::UnexpectedEof {
                    self.unreachable(error)
                } else if head.is_empty() {
                    self.garbled("it closed the connection without an answer")
                } else {
                    self.garbled("its answer ends in the middle")
                }
            })?;
            head.push(byte);
        }
        self.judge(&String::from_utf8_lossy(&head), target)
    }

    /// What an answer means.
    fn judge(&self, head: &str, target: &str) -> Result<(), ProxyError> {
        let line = head.lines().next().unwrap_or_default();
        let shown: String = line.chars().filter(|c| !c.is_control()).collect();
        let shown: String = shown.chars().take(SAID_CHARS_MAX).collect();
        let (version, said) = shown.split_once(' ').unwrap_or_default();
        let code = said.get(..3).and_then(|code| code.parse::<u16>().ok());
        match code {
            Some(200..=299) if version.starts_with("HTTP/1.") => Ok(()),
            // 401 is what tinyproxy says of a wrong password.
            Some(401 | 407) => Err(ProxyError::WhoAreYou {
                proxy: self.address.clone(),
                tried: self.authorization.is_some(),
            }),
            Some(_) if version.starts_with("HTTP/1.") => Err(ProxyError::Refused {
                proxy: self.address.clone(),
                target: target.to_owned(),
                said: said.to_owned(),
            }),
            Some(_) | None => Err(self.garbled(format!("it says {shown:?}"))),
        }
    }
}

/// The customary port of HTTP proxies (Squid's).
const DEFAULT_PORT: u16 = 3128;

fn with_port(address: &str) -> Result<String, String> {
    // Of `[::1]:3128` and `proxy:3128` the last colon is the port's; `[::1]` and `proxy` have none.
    let (host, port) = match address.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        Some(_) | None => (address, None),
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | '?' | '#' | '@');
    let is_six = host.contains(':');
    if bare.is_empty() || host.contains(odd) || is_six != host.starts_with('[') {
        return Err(format!("{address:?} is not the `host:port` of a proxy"));
    }
    let port = port.map_or(Ok(DEFAULT_PORT), str::parse);
    match port {
        Ok(port) if port > 0 => Ok(format!("{host}:{port}")),
        Ok(_) | Err(_) => Err(format!("{address:?} has no port from 1 to 65535")),
    }
}

fn exception(text: &str) -> Option<Exception> {
    let text = text.trim();
    if text == "*" {
        return Some(Exception::All);
    }
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    if let Ok(net) = bare.parse() {
        return Some(Exception::Net(net));
    }
    if let Ok(ip) = bare.parse::<IpAddr>() {
        return Some(Exception::Net(ip.into()));
    }
    // `.example.org`, `*.example.org` and `example.org` mean the same to most programs.
    let name = text.trim_start_matches('*').trim_start_matches('.');
    (!name.is_empty()).then(|| Exception::Name(name.to_ascii_lowercase()))
}

/// Bytes as `%40` and the like; what is no such thing stays.
fn percent_decoded(text: &str) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        let hex = behind.split_at_checked(2).filter(|_| byte == b'%');
        let value = hex.and_then(|(digits, behind)| {
            let digits = std::str::from_utf8(digits).ok()?;
            Some((u8::from_str_radix(digits, 16).ok()?, behind))
        });
        let (value, behind) = value.unwrap_or((byte, behind));
        decoded.push(value);
        rest = behind;
    }
    decoded
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    fn proxy(url: &str, exceptions: &[&str]) -> HttpProxy {
        let exceptions: Vec<_> = exceptions.iter().map(|&text| text.to_owned()).collect();
        HttpProxy::parse(url, &exceptions).unwrap()
    }

    #[test]
    fn addresses_are_read_as_people_write_them() {
        for (url, address) in [
            ("http://10.0.0.1:3128", "10.0.0.1:3128"),
            ("HTTP://proxy.example.org:8080/", "proxy.example.org:8080"),
            ("proxy", "proxy:3128"),
            ("http://u:p@[fd00::1]", "[fd00::1]:3128"),
            ("http://u:a@b@[fd00::1]:8080", "[fd00::1]:8080"),
        ] {
            assert_eq!(proxy(url, &[]).address(), address, "{url}");
        }
        for (url, said) in [
            ("https://10.0.0.1:3128", "only http://"),
            ("socks5://10.0.0.1:1080", "only http://"),
            ("http://u:secret@", "is not the `host:port`"),
            ("http://fd00::1", "is not the `host:port`"),
            ("http://u:secret@proxy:0", "port from 1"),
            ("http://u:secret@proxy:x", "port from 1"),
            ("http://proxy/path", "is not the `host:port`"),
        ] {
            let error = HttpProxy::parse(url, &[]).unwrap_err();
            assert!(error.contains(said), "{url}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn name_and_password_may_be_percent_encoded_and_are_not_shown() {
        let proxy = proxy("http://edge%40site:p%3Aw%zz@10.0.0.1:3128", &[]);
        let expected = format!("Basic {}", BASE64_STANDARD.encode("edge@site:p:w%zz"));
        assert_eq!(proxy.authorization.as_deref(), Some(&*expected));
        let shown = format!("{proxy:?}");
        assert!(
            !shown.contains("site") && !shown.contains(&expected),
            "{shown}"
        );
    }

    #[test]
    fn exceptions_are_addresses_prefixes_and_names() {
        let some = proxy(
            "p",
            &["10.0.0.0/8", " .lan", "*.example.org", "2001:db8::1", ""],
        );
        for (host, through) in [
            ("10.1.2.3", false),
            ("11.1.2.3", true),
            ("2001:db8::1", false),
            ("[2001:db8::1]", false),
            ("relay.LAN", false),
            ("lan", false),
            ("atlan", true),
            ("a.b.example.org", false),
            ("example.org", false),
        ] {
            assert_eq!(some.is_for(host), through, "{host}");
        }
        assert!(!proxy("p", &["*"]).is_for("192.0.2.1"));
        assert!(proxy("p", &[]).is_for("192.0.2.1"));
    }

    #[test]
    fn every_answer_gets_an_error_that_says_what_to_do() {
        for (url, head, said) in [
            (
                "p:1",
                "HTTP/1.1 407 Proxy Authentication Required\r\n\r\n",
                "asks for a name",
            ),
            (
                "http://u:secret@p:1",
                "HTTP/1.0 407 No\r\n\r\n",
                "does not accept",
            ),
            (
                "http://u:secret@p:1",
                "HTTP/1.0 401 Unauthorized\r\n\r\n",
                "does not accept",
            ),
            (
                "p:1",
                "HTTP/1.1 403 Forbidden\r\n\r\n",
                "refused CONNECT t:2: 403 Forbidden",
            ),
            ("p:1", "HTTP/1.1 503\r\n\r\n", "refused CONNECT t:2: 503"),
            (
                "p:1",
                "SSH-2.0-OpenSSH_9.2\r\n\r\n",
                "does not answer as an HTTP proxy",
            ),
            ("p:1", "\r\n\r\n", "does not answer as an HTTP proxy"),
            (
                "p:1",
                "HTTP/1.1 2é0 \x1b[31m\r\n\r\n",
                "does not answer as an HTTP proxy",
            ),
        ] {
            let error = proxy(url, &[]).judge(head, "t:2").unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
            assert!(
                !error.contains("secret") && !error.contains('\x1b'),
                "{error}"
            );
        }
        proxy("p", &[])
            .judge("HTTP/1.0 200 Connection established\r\n\r\n", "t:2")
            .unwrap();
    }

    /// Talks through a proxy that answers with `answer`; what it was asked, and the result.
    async fn talk(answer: &'static [u8]) -> (String, Result<TcpStream, ProxyError>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serve = async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                asked.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(answer).await.unwrap();
            (String::from_utf8(asked).unwrap(), stream)
        };
        let proxy = proxy(&format!("http://u:p@{address}"), &[]);
        let through = proxy.through(TcpStream::connect(address), "relay:443");
        let ((asked, mut stream), result) = tokio::join!(serve, through);
        if result.is_ok() {
            stream.write_all(b"hello").await.unwrap();
        }
        (asked, result)
    }

    #[tokio::test]
    async fn what_comes_behind_the_answer_is_the_others() {
        let (asked, stream) = talk(b"HTTP/1.1 200 OK\r\nVia: test\r\n\r\n").await;
        assert!(
            asked.starts_with("CONNECT relay:443 HTTP/1.1\r\nHost: relay:443\r\n"),
            "{asked}"
        );
        assert!(
            asked.contains("Proxy-Authorization: Basic dTpw\r\n"),
            "{asked}"
        );
        let mut said = [0; 5];
        stream.unwrap().read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"hello");
    }

    #[tokio::test]
    async fn an_endless_head_ends() {
        let (_, result) = talk(&[b'x'; HEAD_BYTES_MAX + 1]).await;
        let error = result.unwrap_err().to_string();
        assert!(error.contains("8192 bytes"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_proxy_that_hangs_is_named_in_time() {
        let proxy = proxy("10.0.0.1:3128", &[]);
        let began = tokio::time::Instant::now();
        let result = proxy.through(std::future::pending(), "relay:443").await;
        assert!(matches!(result, Err(ProxyError::Silent { .. })));
        assert_eq!(began.elapsed(), ANSWER_TIMEOUT);
    }
}
