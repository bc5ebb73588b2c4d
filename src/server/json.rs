//! A request's body as a value, with every fault named after its parameter.

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, HeaderValue, header};
use futures_util::StreamExt as _;
use serde::de::{DeserializeOwned, Deserializer, Error as _, Visitor, value::Error as Unread};
use serde_json::{Map, Value};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::error::{Answer, ApiError};
use super::state::{AppState, BUFFER_UNIT};

/// The body of a request, as JSON. A member that `T` lacks is refused by name; `null` is as if the member were not there.
#[derive(Debug)]
pub(super) struct Body<T>(pub(super) T);

/// What the members of a body are read as: a struct of which every field has a default, or [`Parts`].
pub(super) trait Members: Sized {
    /// The names of the members.
    fn names() -> Vec<&'static str>;

    /// Reads `members`, which are those of `bytes` that are not `null` and have one of the names.
    ///
    /// # Errors
    /// With the name of a member that cannot be read.
    fn read(members: Map<String, Value>, bytes: &[u8]) -> Answer<Self>;
}

impl<T: DeserializeOwned> Members for T {
    fn names() -> Vec<&'static str> {
        fields::<T>().to_vec()
    }

    fn read(members: Map<String, Value>, bytes: &[u8]) -> Answer<Self> {
        serde_json::from_value(Value::Object(members))
            .map_err(|fault| blamed::<T>(bytes).unwrap_or_else(|| ApiError::invalid(fault.to_string())))
    }
}

/// Members that three structs share out among them. Serde's own way to do that, `flatten`, takes in unknown members.
#[derive(Debug)]
pub(super) struct Parts<A, B, C>(pub(super) A, pub(super) B, pub(super) C);

impl<A: Members, B: Members, C: Members> Members for Parts<A, B, C> {
    fn names() -> Vec<&'static str> {
        [A::names(), B::names(), C::names()].concat()
    }

    fn read(members: Map<String, Value>, bytes: &[u8]) -> Answer<Self> {
        let of = |names: Vec<&str>, members: Map<String, Value>| -> (Map<_, _>, Map<_, _>) {
            members.into_iter().partition(|(name, _)| names.contains(&name.as_str()))
        };
        let (first, rest) = of(A::names(), members);
        let (second, third) = of(B::names(), rest);
        Ok(Self(A::read(first, bytes)?, B::read(second, bytes)?, C::read(third, bytes)?))
    }
}

impl<T: Members + Send + 'static> FromRequest<AppState> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Answer<Self> {
        // A page from elsewhere can send forms and plain text here without being asked to, but no JSON.
        if !is_json(request.headers()) {
            return Err(ApiError::media_type());
        }
        let encoding = request.headers().get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes);
        if encoding.is_some_and(|encoding| !encoding.eq_ignore_ascii_case(b"identity")) {
            return Err(ApiError::content_encoding());
        }
        let (bytes, _room) = collect(request, state).await?;
        let parsed = spawn_blocking(move || parse(&bytes)).await;
        parsed.map_err(|_| ApiError::internal())?.map(Self)
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
}

/// Reads a body within the limits of bytes and time.
async fn collect(request: Request, state: &AppState) -> Answer<(Bytes, Vec<OwnedSemaphorePermit>)> {
    let limits = state.options().limits;
    let announced = request.headers().get(header::CONTENT_LENGTH);
    let announced = announced.and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|bytes| bytes > limits.body_bytes) {
        return Err(ApiError::too_large(limits.body_bytes));
    }
    let mut rooms = Vec::new();
    let mut held = 0;
    let mut bytes = Vec::new();
    let mut stream = request.into_body().into_data_stream();
    let whole = async {
        loop {
            let Ok(next) = timeout(limits.stall_time, stream.next()).await else {
                return Err(ApiError::slow());
            };
            let Some(piece) = next else { return Ok(()) };
            let piece = piece.map_err(|_| ApiError::malformed("the body ended early; send all of it"))?;
            if bytes.len() + piece.len() > limits.body_bytes {
                return Err(ApiError::too_large(limits.body_bytes));
            }
            bytes.extend_from_slice(&piece);
            let wanted = bytes.len().div_ceil(BUFFER_UNIT);
            let more = u32::try_from(wanted - held).unwrap_or(u32::MAX);
            let room = std::sync::Arc::clone(state.buffered()).try_acquire_many_owned(more);
            rooms.push(room.map_err(|_| {
                ApiError::busy("the bodies of other requests take all room; ask again in a while")
            })?);
            held = wanted;
        }
    };
    timeout(limits.request_time, whole).await.map_err(|_| ApiError::slow())??;
    Ok((bytes.into(), rooms))
}

/// Reads `bytes` as a `T`.
pub(super) fn parse<T: Members>(bytes: &[u8]) -> Answer<T> {
    let value = serde_json::from_slice(bytes).map_err(|e| {
        ApiError::malformed(format!("the body cannot be read as JSON ({e}); send one object"))
    })?;
    let Value::Object(mut members) = value else {
        return Err(ApiError::malformed("the body is JSON but no object; send one object"));
    };
    members.retain(|_, value| !value.is_null());
    let known = T::names();
    if let Some(name) = members.keys().find(|name| !known.contains(&name.as_str())) {
        return Err(ApiError::unsupported(name, ""));
    }
    T::read(members, bytes)
}

/// The member of `T` that cannot be read, and why: they are tried one at a time, since what serde says of a whole object
/// does not name the member.
fn blamed<T: DeserializeOwned>(bytes: &[u8]) -> Option<ApiError> {
    let members: Map<String, Value> = serde_json::from_slice(bytes).ok()?;
    let known = fields::<T>();
    let members = members.into_iter().filter(|(name, value)| known.contains(&&name[..]) && !value.is_null());
    members.into_iter().find_map(|(name, value)| {
        let alone = Map::from_iter([(name.clone(), value)]);
        let fault = serde_json::from_value::<T>(Value::Object(alone)).err()?;
        Some(ApiError::value(&name, format!("{name} cannot be read: {}", plain(&fault.to_string()))))
    })
}

/// What serde says of a value, without Rust's names of numbers at its end.
fn plain(fault: &str) -> String {
    let Some((found, wanted)) = fault.rsplit_once("expected ") else { return fault.to_owned() };
    let wanted = match wanted {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number from 0 on",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        other => other,
    };
    format!("{found}expected {wanted}")
}

/// The names of the fields of `T`.
fn fields<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut names: &'static [&'static str] = &[];
    // The attempt always fails; what it asked for is what is wanted.
    let _ = T::deserialize(Names(&mut names));
    names
}

/// Holds nothing, and notes which fields were asked for.
struct Names<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for Names<'_> {
    type Error = Unread;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Unread> {
        Err(Unread::custom("there is no value"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Unread> {
        *self.0 = fields;
        self.deserialize_any(visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// Takes the members that are `null` out of `value` and of all below it.
pub(super) fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(members) => {
            let members = members.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(members.map(|(name, value)| (name, without_nulls(value))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(without_nulls).collect()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Asked {
        model: String,
        temperature: Option<f32>,
        stop: Vec<String>,
    }

    fn fault(body: &str) -> Value {
        parse::<Asked>(body.as_bytes()).unwrap_err().body()["error"].take()
    }

    #[test]
    fn null_is_as_if_the_member_were_not_there() {
        let asked =
            parse::<Asked>(br#"{"model": "m", "temperature": null, "stop": null, "tools": null}"#).unwrap();
        assert_eq!(asked, Asked { model: "m".to_owned(), ..Asked::default() });
        assert_eq!(fields::<Asked>(), ["model", "temperature", "stop"]);
    }

    #[test]
    fn a_fault_names_the_parameter() {
        let unknown = fault(r#"{"model": "m", "tools": []}"#);
        assert_eq!(
            (unknown["param"].as_str(), unknown["code"].as_str()),
            (Some("tools"), Some("unsupported_parameter"))
        );
        assert_eq!(unknown["message"], "tools is not supported; leave it out");
        let wrong = fault(r#"{"model": "m", "temperature": "hot"}"#);
        assert_eq!(
            (wrong["param"].as_str(), wrong["code"].as_str()),
            (Some("temperature"), Some("invalid_value"))
        );
        assert_eq!(
            wrong["message"],
            "temperature cannot be read: invalid type: string \"hot\", expected a number"
        );
    }

    #[test]
    fn structs_share_the_members_out_and_a_fault_in_each_is_named() {
        #[derive(Debug, Default, PartialEq, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        struct Second {
            top_p: Option<f32>,
        }

        #[derive(Debug, Default, PartialEq, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        struct Third {
            user: Option<String>,
        }

        type All = Parts<Asked, Second, Third>;
        let Parts(asked, second, third) =
            parse::<All>(br#"{"top_p": 0.5, "user": "u", "stop": ["a"], "model": null}"#).unwrap();
        assert_eq!(asked, Asked { stop: vec!["a".to_owned()], ..Asked::default() });
        assert_eq!((second.top_p, third.user.as_deref()), (Some(0.5), Some("u")));
        assert_eq!(All::names(), ["model", "temperature", "stop", "top_p", "user"]);
        for (body, param, code) in [
            (r#"{"model": "m", "top_p": "half"}"#, "top_p", "invalid_value"),
            (r#"{"model": "m", "user": 1}"#, "user", "invalid_value"),
            (r#"{"stop": 1, "user": "u"}"#, "stop", "invalid_value"),
            (r#"{"user": "u", "tools": []}"#, "tools", "unsupported_parameter"),
        ] {
            let fault = parse::<All>(body.as_bytes()).unwrap_err().body();
            assert_eq!((&fault["error"]["param"], &fault["error"]["code"]), (&param.into(), &code.into()));
        }
    }

    #[test]
    fn what_is_no_object_is_malformed() {
        for body in ["", "{", "[]", "null", "\"a\"", "{}{}", "\u{feff}{}", &"[".repeat(100_000)] {
            assert_eq!(fault(body)["code"], "malformed_json", "{}", &body[..body.len().min(20)]);
        }
        assert_eq!(
            parse::<Asked>(b"{\"model\": \"\xff\"}").unwrap_err().body()["error"]["code"],
            "malformed_json"
        );
    }
}
