//! The paths that a source file names, found without compiling it.

/// A file below `src`.
pub struct Source {
    /// Relative to `src`.
    pub name: String,
    /// What is in it.
    pub text: String,
}

impl Source {
    /// The path of its module; empty for `lib.rs`.
    pub fn module(&self) -> Vec<String> {
        let name = self.name.trim_end_matches(".rs");
        let parts = name.split('/').filter(|part| !matches!(*part, "mod" | "lib"));
        parts.map(str::to_owned).collect()
    }

    /// Whether its documentation says that it is pure.
    pub fn is_marked_pure(&self) -> bool {
        self.text.starts_with("//! PURE")
    }
}

/// A path as it is written, or as an import in braces means it.
#[derive(Debug, PartialEq, Eq)]
pub struct Named {
    /// Its parts.
    pub segments: Vec<String>,
    /// Where it is written.
    pub line: usize,
}

impl Named {
    /// Which item of this crate it names, seen from a module; none for what is not of this crate or only of the module itself.
    pub fn resolve(&self, here: &[String]) -> Option<Vec<String>> {
        let first = self.segments.first()?;
        if first == "crate" || first == "mvm" {
            return Some(self.segments[1..].to_vec());
        }
        let up = self.segments.iter().take_while(|segment| *segment == "super").count();
        if up == 0 {
            return None;
        }
        let base = &here[..here.len().saturating_sub(up)];
        Some(base.iter().chain(&self.segments[up..]).cloned().collect())
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(String),
    /// `::`
    Join,
    Mark(char),
}

/// Every path outside of comments, texts and what is compiled for tests only.
pub fn paths_of(text: &str) -> Vec<Named> {
    let tokens = without_tests(tokens(text));
    let mut paths = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let (token, line) = &tokens[at];
        match token {
            Token::Word(word) if word == "use" => at = tree(&tokens, at + 1, &mut Vec::new(), &mut paths),
            Token::Word(_) => {
                let mut segments = Vec::new();
                while let Some((Token::Word(word), _)) = tokens.get(at) {
                    segments.push(word.clone());
                    at += 1;
                    if tokens.get(at).map(|t| &t.0) != Some(&Token::Join) {
                        break;
                    }
                    at += 1;
                }
                paths.push(Named { segments, line: *line });
            }
            _ => at += 1,
        }
    }
    paths
}

/// Reads what an import names from `at` on; returns where it ends.
fn tree(tokens: &[(Token, usize)], mut at: usize, prefix: &mut Vec<String>, paths: &mut Vec<Named>) -> usize {
    let depth = prefix.len();
    let mut named = false;
    while let Some((token, line)) = tokens.get(at) {
        match token {
            Token::Word(word) if word == "as" => at += 1,
            Token::Word(word) => {
                prefix.push(word.clone());
                named = true;
            }
            Token::Mark('*') => named = true,
            Token::Join => {}
            Token::Mark('{') => {
                at += 1;
                while tokens.get(at).is_some_and(|(token, _)| *token != Token::Mark('}')) {
                    at = tree(tokens, at, prefix, paths);
                    if tokens.get(at).is_some_and(|(token, _)| *token == Token::Mark(',')) {
                        at += 1;
                    }
                }
                named = false;
            }
            Token::Mark(_) => {
                if named {
                    paths.push(Named { segments: prefix.clone(), line: *line });
                }
                break;
            }
        }
        at += 1;
    }
    prefix.truncate(depth);
    at
}

/// Leaves out each item after `#[cfg(test)]`.
fn without_tests(tokens: Vec<(Token, usize)>) -> Vec<(Token, usize)> {
    let cfg_test: Vec<Token> = self::tokens("#[cfg(test)]").into_iter().map(|(token, _)| token).collect();
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if !tokens[at..].iter().map(|(token, _)| token).take(cfg_test.len()).eq(&cfg_test) {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        }
        let mut depth = 0;
        while let Some((token, _)) = tokens.get(at) {
            at += 1;
            match token {
                Token::Mark('{') => depth += 1,
                Token::Mark('}') => depth -= 1,
                Token::Mark(';') => {}
                _ => continue,
            }
            if depth == 0 {
                break;
            }
        }
    }
    kept
}

fn tokens(text: &str) -> Vec<(Token, usize)> {
    let chars: Vec<char> = text.chars().collect();
    let get = |at: usize| chars.get(at).copied().unwrap_or('\0');
    let mut tokens = Vec::new();
    let (mut at, mut line) = (0, 1);
    while at < chars.len() {
        let begin = at;
        match chars[at] {
            '/' if get(at + 1) == '/' => at = position(&chars, at, &['\n']),
            '/' if get(at + 1) == '*' => at = position(&chars, at + 2, &['*', '/']) + 2,
            'r' if get(at + 1) == '"' || get(at + 1) == '#' && matches!(get(at + 2), '"' | '#') => {
                let marks = chars[at + 1..].iter().take_while(|c| **c == '#').count();
                let end: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', marks)).collect();
                at = position(&chars, at + 2 + marks, &end) + end.len();
            }
            '"' => at = quoted(&chars, at, '"'),
            // A character, not a lifetime.
            '\'' if get(at + 1) == '\\' || get(at + 2) == '\'' => at = quoted(&chars, at, '\''),
            ':' if get(at + 1) == ':' => {
                tokens.push((Token::Join, line));
                at += 2;
            }
            c if c.is_alphanumeric() || c == '_' => {
                while get(at).is_alphanumeric() || get(at) == '_' {
                    at += 1;
                }
                tokens.push((Token::Word(chars[begin..at].iter().collect()), line));
            }
            c => {
                if !c.is_whitespace() {
                    tokens.push((Token::Mark(c), line));
                }
                at += 1;
            }
        }
        at = at.min(chars.len());
        line += chars[begin..at].iter().filter(|c| **c == '\n').count();
    }
    tokens
}

fn quoted(chars: &[char], mut at: usize, mark: char) -> usize {
    at += 1;
    while at < chars.len() && chars[at] != mark {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

fn position(chars: &[char], from: usize, what: &[char]) -> usize {
    let found = chars.get(from..).and_then(|rest| rest.windows(what.len()).position(|window| window == what));
    found.map_or(chars.len(), |at| from + at)
}

#[test]
fn imports_calls_and_types_are_found_and_texts_and_tests_are_not() {
    let text = r##"
        //! crate::comment
        use crate::{a::{b, c as d}, e::*};
        use std::fs;
        #[cfg(test)]
        use crate::only_tests;
        fn f<'a>(x: &'a crate::g::H) { "crate::text"; r#"crate::"raw"#; '"'; super::super::i::j(); /* crate::k */ }
        #[cfg(test)]
        mod tests { use crate::t; fn x() { crate::u::v() } }
        use super::z;
    "##;
    let found: Vec<String> = paths_of(text).into_iter().map(|path| path.segments.join("::")).filter(|path| path.contains("::")).collect();
    assert_eq!(found, ["crate::a::b", "crate::a::c", "crate::e", "std::fs", "crate::g::H", "super::super::i::j", "super::z"]);
}

#[test]
fn paths_through_super_lead_to_other_modules() {
    let here: Vec<String> = ["vm", "pool"].map(str::to_owned).to_vec();
    let named = |text: &str| Named { segments: text.split("::").map(str::to_owned).collect(), line: 1 };
    assert_eq!(named("super::super::host::Host").resolve(&here).unwrap(), ["host", "Host"]);
    assert_eq!(named("super::tenant").resolve(&here).unwrap(), ["vm", "tenant"]);
    assert_eq!(named("std::fs").resolve(&here), None);
}
