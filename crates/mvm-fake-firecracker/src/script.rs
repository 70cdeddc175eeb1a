//! How it is told to misbehave.
//!
//! A JSON object: packed, in the environment (`FAKE_FIRECRACKER_SCRIPT`, the text itself or a path), or in
//! `fake-firecracker.json` beside the program.
//!
//! ```json
//! {
//!   "version": "1.15.0",
//!   "tap": "pretend",
//!   "kernel": "any",
//!   "PUT /snapshot/create": {"do": "die", "when": "middle"},
//!   "PATCH /vm": {"do": ["slow:200ms", "fault:Internal error"], "skip": 1, "times": 1},
//!   "CONNECT 5200": {"do": "hang"},
//!   "running": {"do": ["slow:50ms", "exit:148"]}
//! }
//! ```
//!
//! Keys are calls with their whole paths; `listen` is the moment before the socket is there, `running` the time after each
//! start and resume, `CONNECT <port>` a connection to the guest. `when` is `before` (nothing is done, as if it were not),
//! `middle` (a snapshot's state and half of its memory are written; otherwise as `after`) or `after` (it is done, and not
//! answered). What is done, one after the other:
//!
//! | word | what happens |
//! |---|---|
//! | `hang` | nothing, for ever |
//! | `slow:200ms` | a wait; then the next word, or what would have happened anyway |
//! | `close` | the connection is closed |
//! | `cut` | half an answer, then the connection is closed |
//! | `garbage` | an answer that is not HTTP |
//! | `flood` | an answer with a body without end |
//! | `fault:text` | status 400 with that message |
//! | `die` | SIGKILL; for the first process of a PID namespace, to which its own is none, an abort |
//! | `exit:148` | an end with that code |
//! | `leave:200ms` | the first thread ends, the others go on that long; then the next word |

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;

use crate::package::Package;
use crate::signals;

/// A script and how far it is.
#[derive(Debug)]
pub struct Script {
    pub version: String,
    pub snapshot_version: String,
    /// Whether TAP devices are only pretended.
    pub pretend_tap: bool,
    /// Whether any file is a kernel.
    pub any_kernel: bool,
    /// Whether the guest has a driver for a keyboard.
    pub keyboard: bool,
    rules: BTreeMap<String, Rule>,
    used: Mutex<BTreeMap<String, u32>>,
}

/// When something happens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum When {
    #[default]
    Before,
    Middle,
    After,
}

/// One word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Deed {
    Hang,
    Slow(Duration),
    Close,
    Cut,
    Garbage,
    Flood,
    Fault(String),
    Die,
    Exit(i32),
    Leave(Duration),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    #[serde(rename = "do")]
    words: Words,
    #[serde(default)]
    when: When,
    /// How many times nothing happens first.
    #[serde(default)]
    skip: u32,
    /// How many times it happens; always when absent.
    times: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Words {
    One(String),
    Many(Vec<String>),
}

impl Script {
    pub fn read(package: &Package) -> Result<Self, String> {
        let mut script = Self::parse(&package.script()?.unwrap_or_else(|| "{}".into()))?;
        if let Ok(version) = std::env::var("FAKE_FIRECRACKER_VERSION") {
            script.version = version;
        }
        Ok(script)
    }

    pub fn parse(text: &str) -> Result<Self, String> {
        let entries: BTreeMap<String, Value> = serde_json::from_str(text).map_err(|error| format!("the script: {error}"))?;
        let mut script = Self {
            version: "1.17.0".into(),
            snapshot_version: "v11.0.0".into(),
            pretend_tap: false,
            any_kernel: false,
            keyboard: true,
            rules: BTreeMap::new(),
            used: Mutex::default(),
        };
        for (key, value) in entries {
            let wrong = || format!("the script: {key} cannot be {value}");
            match (key.as_str(), value.as_str()) {
                ("version", Some(text)) => script.version = text.into(),
                ("snapshot_version", Some(text)) => script.snapshot_version = text.into(),
                ("tap", Some("pretend")) => script.pretend_tap = true,
                ("tap", Some("real")) => {}
                ("kernel", Some("any")) => script.any_kernel = true,
                ("kernel", Some("real")) => {}
                ("keyboard", _) => script.keyboard = value.as_bool().ok_or_else(wrong)?,
                ("version" | "snapshot_version" | "tap" | "kernel", _) => return Err(wrong()),
                _ => {
                    let rule: Rule = serde_json::from_value(value).map_err(|error| format!("the script: {key}: {error}"))?;
                    rule.deeds().map_err(|why| format!("the script: {key}: {why}"))?;
                    script.rules.insert(key, rule);
                }
            }
        }
        Ok(script)
    }

    /// What happens now, if anything; it has then happened once more.
    pub fn deeds(&self, key: &str) -> Option<(When, Vec<Deed>)> {
        let rule = self.rules.get(key)?;
        let mut used = self.used.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let count = used.entry(key.into()).or_default();
        *count += 1;
        let happens = *count > rule.skip && rule.times.is_none_or(|times| *count - rule.skip <= times);
        happens.then(|| (rule.when, rule.deeds().unwrap_or_default()))
    }

    /// Does what needs no connection, where there is none.
    pub fn act(&self, key: &str, now: When) {
        if let Some((when, deeds)) = self.deeds(key)
            && when == now
        {
            deeds.iter().for_each(Deed::alone);
        }
    }
}

impl Rule {
    fn deeds(&self) -> Result<Vec<Deed>, String> {
        let words: &[String] = match &self.words {
            Words::One(word) => std::slice::from_ref(word),
            Words::Many(words) => words,
        };
        words.iter().map(|word| Deed::parse(word)).collect()
    }
}

impl Deed {
    fn parse(word: &str) -> Result<Self, String> {
        let (name, value) = word.split_once(':').unwrap_or((word, ""));
        let wrong = || format!("{word:?} is nothing that can be done");
        let wait = || value.strip_suffix("ms").and_then(|ms| ms.parse().ok()).map(Duration::from_millis).ok_or_else(wrong);
        Ok(match name {
            "hang" => Self::Hang,
            "slow" => Self::Slow(wait()?),
            "leave" => Self::Leave(wait()?),
            "close" => Self::Close,
            "cut" => Self::Cut,
            "garbage" => Self::Garbage,
            "flood" => Self::Flood,
            "fault" => Self::Fault(value.into()),
            "die" => Self::Die,
            "exit" => Self::Exit(value.parse().map_err(|_| wrong())?),
            _ => return Err(wrong()),
        })
    }

    /// Does it as far as there is nobody to say something to.
    pub fn alone(&self) {
        match self {
            Self::Hang => loop {
                std::thread::park();
            },
            Self::Slow(wait) => std::thread::sleep(*wait),
            Self::Die => {
                let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
                std::process::abort();
            }
            Self::Exit(code) => std::process::exit(*code),
            Self::Leave(wait) => {
                signals::end_first_thread();
                std::thread::sleep(*wait);
            }
            Self::Close | Self::Cut | Self::Garbage | Self::Flood | Self::Fault(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_holds_when_it_says() {
        let script =
            Script::parse(r#"{"version":"1.2.3","PUT /a":{"do":["slow:5ms","fault:a:b"],"skip":1,"times":2,"when":"after"}}"#).unwrap();
        assert_eq!(script.version, "1.2.3");
        assert_eq!(script.deeds("PUT /b"), None);
        let deeds = Some((When::After, vec![Deed::Slow(Duration::from_millis(5)), Deed::Fault("a:b".into())]));
        let seen: Vec<_> = (0..4).map(|_| script.deeds("PUT /a")).collect();
        assert_eq!(seen, [None, deeds.clone(), deeds, None]);
    }

    #[test]
    fn a_script_with_a_mistake_is_refused() {
        for text in [
            "[]",
            r#"{"PUT /a":{"do":"jump"}}"#,
            r#"{"PUT /a":{"do":"slow:1s"}}"#,
            r#"{"PUT /a":{}}"#,
            r#"{"tap":"none"}"#,
            r#"{"PUT /a":{"do":"die","wen":"after"}}"#,
        ] {
            assert!(Script::parse(text).is_err(), "{text}");
        }
    }
}
