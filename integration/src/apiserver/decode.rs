//! Reading request bodies: JSON or YAML, and which fields they say twice.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::{
    error::{ApiError, ApiResult},
    schema::join,
};

/// A body, and the paths of fields that it says more than once.
#[derive(Debug, Clone, Default)]
pub(crate) struct Body {
    pub(crate) value: Value,
    pub(crate) duplicates: Vec<String>,
}

impl From<Value> for Body {
    fn from(value: Value) -> Self {
        Self {
            value,
            duplicates: Vec::new(),
        }
    }
}

/// Reads a body.
///
/// # Errors
///
/// 400 if it is neither JSON nor YAML.
pub(crate) fn decode(bytes: &[u8]) -> ApiResult<Body> {
    let mut duplicates = Vec::new();
    let seed = Strict {
        path: String::new(),
        duplicates: &mut duplicates,
    };
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let read = seed.deserialize(&mut json);
    if let Ok(value) = read.and_then(|value| json.end().map(|()| value)) {
        return Ok(Body { value, duplicates });
    }
    let value = serde_yaml_ng::from_slice::<Value>(bytes)
        .map_err(|error| ApiError::bad_request(format!("error decoding request body: {error}")))?;
    Ok(value.into())
}

struct Strict<'a> {
    path: String,
    duplicates: &'a mut Vec<String>,
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, yes: bool) -> Result<Value, E> {
        Ok(yes.into())
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
        Ok(Number::from_f64(number).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        loop {
            let seed = Strict {
                path: format!("{}[{}]", self.path, list.len()),
                duplicates: &mut *self.duplicates,
            };
            match items.next_element_seed(seed)? {
                Some(item) => list.push(item),
                None => return Ok(Value::Array(list)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = members.next_key::<String>()? {
            let path = join(&self.path, &key);
            if map.contains_key(&key) {
                self.duplicates.push(path.clone());
            }
            let seed = Strict {
                path,
                duplicates: &mut *self.duplicates,
            };
            let value = members.next_value_seed(seed)?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_and_yaml_are_read() {
        assert_eq!(
            decode(b"{\"a\": [1, -2, 1.5, null]}").unwrap().value,
            json!({"a": [1, -2, 1.5, null]})
        );
        assert_eq!(decode(b"a:\n- b\n").unwrap().value, json!({"a": ["b"]}));
        assert!(decode(b"{\"a\": ").is_err());
    }

    #[test]
    fn what_is_said_twice_is_told() {
        let body = decode(b"{\"a\": {\"b\": 1, \"b\": 2}, \"c\": [{\"d\": 1, \"d\": 1}]}").unwrap();
        assert_eq!(body.duplicates, ["a.b", "c[0].d"]);
        assert_eq!(body.value["a"]["b"], 2);
    }
}
