//! Users of the guest, from `/etc/passwd`.

/// Whom a command runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// As in the first field.
    pub name: String,
    /// Numeric user id.
    pub uid: u32,
    /// Numeric primary group id.
    pub gid: u32,
    /// Home directory.
    pub home: String,
}

impl User {
    /// Whether nothing has to be given up.
    pub fn is_root(&self) -> bool {
        self.uid == 0 && self.gid == 0
    }
}

/// Finds a user by name or number; the empty name is root, and a number need not be listed.
///
/// # Errors
/// A sentence, when there is no such user.
pub fn find(wanted: &str) -> Result<User, String> {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    find_in(&passwd, wanted)
}

fn find_in(passwd: &str, wanted: &str) -> Result<User, String> {
    let number: Option<u32> = wanted.parse().ok();
    let listed = passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let (&[name, _, uid, gid], home) = (fields.get(..4)?.first_chunk()?, fields.get(5)?);
        let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
        let same = match (wanted, number) {
            ("", _) => uid == 0,
            (_, Some(number)) => uid == number,
            (_, None) => name == wanted,
        };
        same.then(|| User { name: name.into(), uid, gid, home: (*home).into() })
    });
    match (listed, wanted, number) {
        (Some(user), _, _) => Ok(user),
        (None, "", _) => Ok(User { name: "root".into(), uid: 0, gid: 0, home: "/".into() }),
        // 2^32 - 1 means "leave as it is" to the kernel.
        (None, _, Some(uid)) if uid != u32::MAX => Ok(User { name: wanted.into(), uid, gid: uid, home: "/".into() }),
        (None, _, _) => Err(format!("the guest has no user {:?}", wanted.chars().take(64).collect::<String>())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_and_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:44::/srv:/bin/sh\nbroken\n";
        assert_eq!(find_in(passwd, "").unwrap().home, "/root");
        assert_eq!(find_in(passwd, "web").unwrap().gid, 44);
        assert_eq!(find_in(passwd, "33").unwrap().name, "web");
        assert_eq!(find_in(passwd, "1000").unwrap().uid, 1000);
        assert!(find_in(passwd, "nobody").is_err());
        assert!(find_in(passwd, "4294967295").is_err());
        assert_eq!(find_in("", "").unwrap().uid, 0);
    }
}
