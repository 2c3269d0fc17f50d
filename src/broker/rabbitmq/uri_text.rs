//! A strict parser of a broker's URI.
//!
//! **Invariants.** A text that two readers could understand differently is refused: an accepted
//! text has one reading. No error shows anything of the text. The password is decoded into memory
//! that is wiped when it is freed.

use std::net::Ipv6Addr;

use percent_encoding::percent_decode_str;
use zeroize::Zeroizing;

use crate::error::SettingError;

/// The decoded parts of a URI. A part that was left out has its default.
pub(super) struct Parts {
    pub(super) tls: bool,
    pub(super) user: String,
    pub(super) password: Zeroizing<String>,
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) vhost: String,
    pub(super) heartbeat_s: Option<u16>,
}

const FORM: &str =
    "not an AMQP URI; expected amqp://user:password@host:port/vhost, special characters percent-encoded";

/// Parses `amqp://user:password@host:port/vhost?heartbeat=seconds`.
pub(super) fn parse(url: &str) -> Result<Parts, SettingError> {
    if !url.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(refuse(
            "it holds a space, a control character or a character outside ASCII; percent-encode it (a space is %20)",
        ));
    }
    if url.contains(['\\', '#']) {
        return Err(refuse("`\\` and `#` must be percent-encoded, as %5C and %23"));
    }
    let (scheme, rest) = url.split_once("://").ok_or_else(|| refuse(FORM))?;
    let tls = match scheme {
        _ if scheme.eq_ignore_ascii_case("amqp") => false,
        _ if scheme.eq_ignore_ascii_case("amqps") => true,
        _ => return Err(refuse(FORM)),
    };
    let (address, query) = match rest.split_once('?') {
        Some((address, query)) => (address, Some(query)),
        None => (rest, None),
    };
    let heartbeat_s = query.map_or(Ok(None), heartbeat)?;
    let (authority, path) = match address.split_once('/') {
        Some((authority, path)) => (authority, Some(path)),
        None => (address, None),
    };
    // This check comes first: a raw `/` in a password would make the user the host, and the
    // password a virtual host.
    if path.is_some_and(|path| path.contains('@')) {
        return Err(refuse(
            "there is an `@` behind the first `/`; a `/` in user or password is written %2F, an `@` in a virtual host %40",
        ));
    }
    if path.is_some_and(|path| path.contains('/')) {
        return Err(refuse("a `/` in the virtual host is written %2F"));
    }
    let (user, password, place) = login(authority)?;
    let (host, port) = host_and_port(place)?;
    let vhost = match path {
        None => "/".to_owned(),
        Some(path) => {
            let vhost = decode(path)?;
            if vhost.chars().any(char::is_control) {
                return Err(refuse("the virtual host holds a control character"));
            }
            vhost.to_string()
        }
    };
    let port = port.unwrap_or(if tls { 5671 } else { 5672 });
    Ok(Parts { tls, user, password, host, port, vhost, heartbeat_s })
}

/// Returns user, password, and the rest. Without an `@` the user is RabbitMQ's guest.
fn login(authority: &str) -> Result<(String, Zeroizing<String>, &str), SettingError> {
    let Some((login, place)) = authority.split_once('@') else {
        return Ok(("guest".to_owned(), Zeroizing::new("guest".to_owned()), authority));
    };
    if place.contains('@') {
        return Err(refuse("an `@` in user or password is written %40"));
    }
    let (user, password) = login.split_once(':').unwrap_or((login, ""));
    let (user, password) = (decode(user)?.to_string(), decode(password)?);
    if user.is_empty() || password.is_empty() {
        return Err(refuse(
            "before the `@` it must name a user and a password (user:password@); neither may be empty",
        ));
    }
    if user.contains('\0') || password.contains('\0') {
        return Err(refuse("user and password must not hold a zero byte"));
    }
    Ok((user, password, place))
}

/// Returns the host (a name, an IPv4 address, or an IPv6 address in brackets) and the port, if
/// there is one.
fn host_and_port(place: &str) -> Result<(String, Option<u16>), SettingError> {
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => {
            let (literal, behind) = rest.split_once(']').ok_or_else(|| refuse("the host lacks its `]`"))?;
            let address: Ipv6Addr =
                literal.parse().map_err(|_| refuse("the host in brackets is not an IPv6 address"))?;
            let port = match behind {
                "" => None,
                behind => Some(behind.strip_prefix(':').ok_or_else(|| refuse(FORM))?),
            };
            (address.to_string(), port)
        }
        None => {
            let (name, port) = match place.split_once(':') {
                Some((_, port)) if port.contains(':') => {
                    return Err(refuse("the host has more than one `:`; an IPv6 address stands in brackets"));
                }
                Some((name, port)) => (name, Some(port)),
                None => (place, None),
            };
            if name.is_empty() {
                return Err(refuse("the host is empty; a `/` in user or password is written %2F"));
            }
            let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
            if !name.bytes().all(is_part) {
                return Err(refuse(
                    "the host may hold letters, digits, `-`, `.` and `_`; an IPv6 address stands in brackets",
                ));
            }
            (name.to_owned(), port)
        }
    };
    let port = port.map(|port| {
        let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        let number = port.parse::<u16>().ok().filter(|number| digits && *number != 0);
        number.ok_or_else(|| refuse("the port must be a number from 1 to 65535"))
    });
    Ok((host, port.transpose()?))
}

/// Returns the only query parameter.
fn heartbeat(query: &str) -> Result<Option<u16>, SettingError> {
    let mut heartbeat_s = None;
    // Neither names nor values are shown: a password with an unescaped `?` ends up here.
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let value = pair.strip_prefix("heartbeat=").ok_or_else(|| {
            refuse(
                "`heartbeat` is the only query parameter; frame size, timeout and mechanism are fixed, TLS is never relaxed, and a `?` in a password is written %3F",
            )
        })?;
        let digits = value.bytes().all(|byte| byte.is_ascii_digit());
        let seconds = value.parse::<u16>().ok().filter(|_| digits);
        match seconds {
            Some(0) => {
                return Err(refuse(
                    "heartbeat=0 would leave a dead broker unnoticed; give 1 or more seconds",
                ));
            }
            Some(_) if heartbeat_s.is_some() => return Err(refuse("`heartbeat` is given twice")),
            Some(_) => heartbeat_s = seconds,
            None => return Err(refuse("`heartbeat` must be a number of seconds, 65535 at most")),
        }
    }
    Ok(heartbeat_s)
}

/// Decodes percent-encoding. Refuses an encoding that is invalid or not UTF-8.
fn decode(text: &str) -> Result<Zeroizing<String>, SettingError> {
    let mut parts = text.split('%');
    parts.next();
    if !parts.all(|part| {
        part.as_bytes().first_chunk::<2>().is_some_and(|two| two.iter().all(u8::is_ascii_hexdigit))
    }) {
        return Err(refuse("a `%` must be followed by two hexadecimal digits; a `%` itself is written %25"));
    }
    let mut decoded = Zeroizing::new(Vec::with_capacity(text.len()));
    decoded.extend(percent_decode_str(text));
    match String::from_utf8(std::mem::take(&mut *decoded)) {
        Ok(text) => Ok(Zeroizing::new(text)),
        Err(error) => {
            // The bytes may belong to a password.
            drop(Zeroizing::new(error.into_bytes()));
            Err(refuse("a percent-encoded part is not UTF-8"))
        }
    }
}

fn refuse(reason: &str) -> SettingError {
    SettingError::new("url", reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: a reader's password must not be another reader's host or virtual host. Method: odd
    /// texts, each with a canary for its password; all are refused, and no error shows the canary.
    #[test]
    fn texts_with_two_readings_are_refused_and_not_shown() {
        let pw = "s3cr3tCANARY";
        for (text, escape) in [
            (format!("amqps:/u:{pw}@h/"), "amqp://user"),
            (format!("amqps:u:{pw}@h/"), "amqp://user"),
            (format!("amqps:\\\\u:{pw}@h/"), "%5C"),
            (format!("amqps:///u:{pw}@h/"), "%2F"),
            (format!("amqps:////u:{pw}@h/"), "%2F"),
            (format!("amqp://u:a/{pw}@h/v"), "%2F"),
            (format!("amqp://u:{pw}/@h"), "%2F"),
            (format!("amqp://u/{pw}:x@h"), "%2F"),
            (format!("amqp:///{pw}"), "%2F"),
            (format!("amqp://u:{pw}@h/a/b"), "%2F"),
            (format!("amqp://u:{pw}@h/a@b"), "%40"),
            (format!("amqp://u:a@{pw}@h"), "%40"),
            (format!("amqp://u:{pw}?@h"), "%3F"),
            (format!("amqp://u:{pw}#@h"), "%23"),
            (format!("amqp://u:{pw}\\@h"), "%5C"),
            (format!("amqp://u:{pw}\n@h"), "percent-encode"),
            (format!("amqp://u:\t{pw}@h"), "percent-encode"),
            (format!("amqp://u:{pw}\r@h"), "percent-encode"),
            (format!(" amqp://u:{pw}@h"), "percent-encode"),
            (format!("amqp://u:{pw}@h "), "percent-encode"),
            (format!("amqp://u:{pw}\u{7f}@h"), "percent-encode"),
            (format!("amqp://u:{pw}ü@h"), "percent-encode"),
            (format!("amqp://u:{pw}%@h"), "%25"),
            (format!("amqp://u:{pw}%g1@h"), "%25"),
            (format!("amqp://u:{pw}%1@h"), "%25"),
            (format!("amqp://u:{pw}%ff@h"), "UTF-8"),
            (format!("amqp://u:{pw}%00@h"), "zero byte"),
            (format!("amqp://{pw}@h"), "user:password@"),
            (format!("amqp://{pw}:@h"), "user:password@"),
            (format!("amqp://:{pw}@h"), "user:password@"),
            ("amqp://@h".to_owned(), "user:password@"),
            (format!("amqp://u:{pw}@"), "host is empty"),
            (format!("amqp://u:{pw}@:1"), "host is empty"),
            (format!("amqp://u:{pw}@h:"), "port"),
            (format!("amqp://u:{pw}@h:0"), "port"),
            (format!("amqp://u:{pw}@h:65536"), "port"),
            (format!("amqp://u:{pw}@h:+1"), "port"),
            (format!("amqp://u:{pw}@::1"), "brackets"),
            (format!("amqp://u:{pw}@h%61st"), "host may hold"),
            (format!("amqp://u:{pw}@[::1"), "`]`"),
            (format!("amqp://u:{pw}@[::1]x"), "amqp://user"),
            (format!("amqp://u:{pw}@[::1%25eth0]"), "IPv6"),
            (format!("amqp://u:{pw}@h/%0a"), "control character"),
            (format!("amqp://u:{pw}@h?heartbeat=1&heartbeat=2"), "twice"),
            (format!("amqp://u:{pw}@h?heartbeat=+1"), "seconds"),
            (format!("amqp://u:{pw}@h?heartbeat="), "seconds"),
            (format!("http://u:{pw}@h"), "amqp://user"),
            (format!("u:{pw}@h"), "amqp://user"),
            (String::new(), "amqp://user"),
            ("amqp://".to_owned(), "host is empty"),
        ] {
            let error = parse(&text).err().unwrap_or_else(|| panic!("{text:?} is accepted"));
            let shown = format!("{error} {error:?}");
            assert!(shown.contains(escape), "{text:?}: {shown}");
            assert!(!shown.contains(pw), "{text:?}: {shown}");
        }
    }

    #[test]
    fn what_is_escaped_is_read_as_it_was_meant() {
        let parts =
            parse("AMQPS://us%40er:p%2Fa%3As%25s%20%c3%bc:x@Broker-1.example_x:5673/a%2fb?heartbeat=7")
                .unwrap();
        assert!(parts.tls);
        assert_eq!((&*parts.user, &**parts.password), ("us@er", "p/a:s%s ü:x"));
        assert_eq!((&*parts.host, parts.port), ("Broker-1.example_x", 5673));
        assert_eq!((&*parts.vhost, parts.heartbeat_s), ("a/b", Some(7)));
        let parts = parse("amqp://[2001:db8::7]/").unwrap();
        assert_eq!((&*parts.user, &**parts.password), ("guest", "guest"));
        assert_eq!((&*parts.host, parts.port, &*parts.vhost), ("2001:db8::7", 5672, ""));
        assert_eq!(parse("amqps://h").unwrap().port, 5671);
        assert_eq!(parse("amqp://h").unwrap().vhost, "/");
    }
}
