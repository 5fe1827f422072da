//! What a path of a Maildir is: a message with its unique name and flags, a file of the mail server's own, or neither.
//!
//! Source: <https://cr.yp.to/proto/maildir.html>, and Dovecot's names (`doc/wiki/MailboxFormat.Maildir`, `src/lib-storage/index/maildir`). Pure.

use twinbox_protocol::path::RelPath;
use twinbox_protocol::rejoin::Flags;

/// A message, by its name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Name {
    /// Directory that has `cur` and `new`.
    pub folder: RelPath,
    /// Its name without flags.
    pub unique: Vec<u8>,
    /// Letters after `:2,`: capital ones are the system's flags, small ones a folder's keywords.
    pub letters: Vec<u8>,
    /// In `new`.
    pub is_new: bool,
}

impl Name {
    /// Reads a path; `None` when it is no message.
    #[must_use]
    pub fn of(path: &RelPath) -> Option<Self> {
        let place = path.parent()?;
        let is_new = match place.name() {
            b"new" => true,
            b"cur" => false,
            _ => return None,
        };
        let (unique, letters) = split(path.name());
        (!unique.is_empty() && !unique.starts_with(b".")).then(|| Name {
            folder: place.parent().unwrap_or_default(),
            unique: unique.to_vec(),
            letters: letters.to_vec(),
            is_new,
        })
    }

    /// Its flags; `keyword` gives the name of a small letter, which stands for itself where nobody knows it.
    #[must_use]
    pub fn flags(&self, keyword: impl Fn(u8) -> Option<String>) -> Flags {
        let name = |letter: &u8| match letter {
            b'a'..=b'z' => keyword(*letter).unwrap_or_else(|| char::from(*letter).to_string()),
            _ => char::from(*letter).to_string(),
        };
        self.letters.iter().map(name).collect()
    }
}

/// A file name as unique name and flags.
#[must_use]
pub fn split(name: &[u8]) -> (&[u8], &[u8]) {
    match name.windows(3).position(|at| at == b":2,") {
        Some(at) => (&name[..at], &name[at + 3..]),
        None => (name, b""),
    }
}

/// Where a message belongs: without flags where no client has seen it.
#[must_use]
pub fn path(folder: &RelPath, unique: &[u8], letters: &[u8]) -> Option<RelPath> {
    if letters.is_empty() {
        return folder.join(b"new")?.join(unique);
    }
    let mut name = [unique, b":2,"].concat();
    let mut letters = letters.to_vec();
    letters.sort_unstable();
    letters.dedup();
    name.extend(letters);
    folder.join(b"cur")?.join(&name)
}

/// Whether the mail server makes this file anew when it is not there, from the messages: indexes, lists of UIDs and folders. Two of them are never merged.
#[must_use]
pub fn is_the_servers_own(path: &RelPath) -> bool {
    const OWN: [&[u8]; 8] = [
        b"dovecot.index",
        b"dovecot-uidlist",
        b"dovecot-uidvalidity",
        b"dovecot.list.index",
        b"dovecot.mailbox.log",
        b"dovecot-keywords",
        b"maildirfolder",
        b"maildirsize",
    ];
    OWN.iter().any(|own| path.name().starts_with(own))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn p(text: &str) -> RelPath {
        RelPath::new(text.as_bytes()).unwrap()
    }

    #[test]
    fn names_are_read_and_made() {
        let name = Name::of(&p("anna/Maildir/.Sent/cur/12.M3P4.host,S=7,W=8:2,FSa")).unwrap();
        assert_eq!((name.folder.clone(), name.unique.as_slice()), (p("anna/Maildir/.Sent"), b"12.M3P4.host,S=7,W=8".as_slice()));
        assert_eq!(name.flags(|_| Some("$Work".into())), ["F", "S", "$Work"].map(String::from).into());
        assert_eq!(name.flags(|_| None), ["F", "S", "a"].map(String::from).into());
        assert_eq!(path(&name.folder, &name.unique, b"SFFa"), Some(p("anna/Maildir/.Sent/cur/12.M3P4.host,S=7,W=8:2,FSa")));
        assert_eq!(path(&p("anna/Maildir"), b"12.x", b""), Some(p("anna/Maildir/new/12.x")));
        assert!(Name::of(&p("anna/Maildir/new/1")).is_some_and(|name| name.is_new && name.letters.is_empty()));
        for other in ["anna/Maildir/tmp/1", "anna/Maildir/cur", "cur", "anna/dovecot.index", "anna/Maildir/cur/.hidden"] {
            assert_eq!(Name::of(&p(other)), None, "{other}");
        }
        assert!(Name::of(&p("cur/1")).is_some_and(|name| name.folder.is_root()));
    }
}
