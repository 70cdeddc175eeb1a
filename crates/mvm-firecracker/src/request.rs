//! One call, before it is sent.

use std::fmt;

use hyper::Method;
use serde::Serialize;

/// One call: a method, a path, and mostly a body.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub method: Method,
    pub path: String,
    pub body: Option<Vec<u8>>,
}

impl Request {
    pub fn get(path: &str) -> Self {
        Self { method: Method::GET, path: path.into(), body: None }
    }

    pub fn put(path: impl Into<String>, body: &impl Serialize) -> Self {
        Self { method: Method::PUT, path: path.into(), body: Some(json(body)) }
    }

    /// A PATCH without a body, which `/balloon/hinting/stop` is alone in taking.
    pub fn bare_patch(path: &str) -> Self {
        Self { method: Method::PATCH, path: path.into(), body: None }
    }

    pub fn patch(path: impl Into<String>, body: &impl Serialize) -> Self {
        Self { method: Method::PATCH, path: path.into(), body: Some(json(body)) }
    }
}

fn json(body: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(body).expect("a resource is made of structs, strings and numbers, which can always be written")
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.path)
    }
}
