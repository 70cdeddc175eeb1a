//! The block "Who may use whom" of the page.

use std::collections::{BTreeMap, BTreeSet};

/// Who may use whom.
#[derive(Debug)]
pub struct Rules {
    /// By the beginning of a module path (`vmm`, `vmm/simulated`): top-level modules.
    allowed: BTreeMap<Vec<String>, BTreeSet<String>>,
    /// Within a module: children, each of which may use those after it.
    within: BTreeMap<String, Vec<String>>,
}

impl Rules {
    /// Reads the first fenced block after the heading.
    pub fn read(page: &str) -> Result<Rules, String> {
        let (_, rest) = page.split_once("\n## Who may use whom\n").ok_or("there is no heading \"Who may use whom\"")?;
        let block = rest.split("```").nth(1).ok_or("there is no fenced block below the heading")?;
        let mut rules = Rules { allowed: BTreeMap::new(), within: BTreeMap::new() };
        for line in block.lines().skip(1).filter(|line| !line.trim().is_empty()) {
            if let Some(rest) = line.strip_prefix("within ") {
                let (module, order) = rest.split_once(':').ok_or_else(|| format!("no colon in {line:?}"))?;
                let order = order.split("->").map(|child| child.trim().to_owned()).collect();
                rules.within.insert(module.trim().to_owned(), order);
                continue;
            }
            let (left, right) = line.split_once("->").ok_or_else(|| format!("no arrow in {line:?}"))?;
            let right: BTreeSet<String> = match right.trim() {
                "(nothing)" => BTreeSet::new(),
                names => names.split_whitespace().map(str::to_owned).collect(),
            };
            for module in left.split([',', ' ']).filter(|module| !module.is_empty()) {
                let module: Vec<String> = module.split('/').map(str::to_owned).collect();
                rules.allowed.entry(module).or_default().extend(right.iter().cloned());
            }
        }
        Ok(rules)
    }

    /// The top-level modules that have a line.
    pub fn modules(&self) -> BTreeSet<String> {
        self.allowed.keys().filter(|module| module.len() == 1).map(|module| module[0].clone()).collect()
    }

    /// May code in the module `here` name the item `there`?
    pub fn check(&self, here: &[String], there: &[String]) -> Result<(), String> {
        let (Some(from), Some(to)) = (here.first(), there.first()) else { return Ok(()) };
        if from == to {
            return self.check_within(from, here.get(1), there.get(1));
        }
        // Everything else at the top (`lib.rs` declares modules and nothing else) is no module.
        if !self.allowed.contains_key(std::slice::from_ref(to)) {
            return Ok(());
        }
        let may = self.allowed.iter().any(|(module, names)| here.starts_with(module) && names.contains(to));
        if may { Ok(()) } else { Err(format!("{} uses {}", here.join("::"), there.join("::"))) }
    }

    fn check_within(&self, module: &str, from: Option<&String>, to: Option<&String>) -> Result<(), String> {
        let place = |name: Option<&String>| self.within.get(module)?.iter().position(|child| Some(child) == name);
        match (place(from), place(to)) {
            (Some(user), Some(used)) if used < user => {
                Err(format!("{module}::{} uses {module}::{}", from.map_or("", |v| v), to.map_or("", |v| v)))
            }
            _ => Ok(()),
        }
    }
}

#[test]
fn a_rule_is_read_and_held() {
    let page = "\n## Who may use whom\n\n```\na -> b c\nb, c -> (nothing)\nb/fake -> c\nwithin a: x -> y\n```\n";
    let rules = Rules::read(page).unwrap();
    let check = |here: &str, there: &str| {
        let split = |text: &str| text.split('/').map(str::to_owned).collect::<Vec<_>>();
        rules.check(&split(here), &split(there)).is_ok()
    };
    assert!(check("a", "b") && check("a/x", "c/y") && check("b/fake/x", "c") && check("a/x", "a/y") && check("b", "std"));
    assert!(!check("b", "a") && !check("b/real", "c") && !check("a/y", "a/x"));
}
