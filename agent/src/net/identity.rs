//! Who a node is: one long-lived Ed25519 key, and the fingerprint others pin.
//!
//! Invariants:
//! - The identity is the *public key*. The certificate TLS needs is made anew from the key at every load and carries no
//!   meaning: [`Fingerprint`] hashes the SubjectPublicKeyInfo (RFC 5280 §4.1.2.7), so it survives a new certificate.
//! - `node.key` is never readable by group or others, appears under its name only when complete and durable, and an
//!   existing file is never overwritten: a replaced key is a different node to every peer.
//!
//! It does not rotate keys, encrypt them at rest, or know who is trusted (see `pinned`).

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use data_encoding::{BASE32_NOPAD, DecodeError};
use rcgen::{CertificateParams, DnType, KeyPair, PKCS_ED25519};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::reset::ResetKey;

/// A PEM Ed25519 key takes 200 bytes; anything near this is not one.
const KEY_FILE_MAX: u64 = 16 * 1024;
const CERT_NAME: &str = "twinbox-node";

/// BLAKE3 of a public key's DER SubjectPublicKeyInfo. As text: 52 characters of lowercase base32, without padding.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// A fingerprint from its 32 raw bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 raw bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The key inside an X.509 certificate. The certificate's own signature, dates and names are not looked at.
    pub fn of_certificate(cert: &CertificateDer<'_>) -> Result<Self, rustls::Error> {
        let spki = ParsedCertificate::try_from(cert)?.subject_public_key_info();
        Ok(Self(*blake3::hash(spki.as_ref()).as_bytes()))
    }

    /// The first 8 characters: enough to tell one's own nodes apart in a log, never to decide trust.
    pub fn short(&self) -> String {
        let mut text = self.to_string();
        text.truncate(8);
        text
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&BASE32_NOPAD.encode(&self.0).to_ascii_lowercase())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({})", self.short())
    }
}

/// Text that is not a fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FingerprintError {
    /// A character outside base32, or a wrong length.
    #[error("a fingerprint is 52 letters and digits (a-z, 2-7), as `twinbox id` prints it")]
    Base32(#[source] DecodeError),
    /// Valid base32 of something else.
    #[error("a fingerprint is 32 bytes, this is {len}")]
    Length {
        /// Bytes found.
        len: usize,
    },
}

impl FromStr for Fingerprint {
    type Err = FingerprintError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let upper = text.trim().to_ascii_uppercase();
        let bytes = BASE32_NOPAD.decode(upper.as_bytes()).map_err(FingerprintError::Base32)?;
        let len = bytes.len();
        let bytes = bytes.try_into().map_err(|_| FingerprintError::Length { len })?;
        Ok(Self(bytes))
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Why a node key could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// There is no key file.
    #[error("no node key at {path}: create one with `twinbox init`, or restore it from a backup")]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// Others can read the key.
    #[error(
        "node key {path} can be read by others (mode {mode:04o}): run `chmod 600 {path}`; if others may have read it, pair the nodes anew with a new key"
    )]
    Exposed {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is not a key.
    #[error("node key {path} is damaged: restore it from a backup, or move it away, create a new key with `twinbox init` and pair again")]
    Damaged {
        /// The key file.
        path: PathBuf,
        /// What the parser said; none if the file is no key file at all (a directory, binary, far too large).
        #[source]
        source: Option<rcgen::Error>,
    },
    /// The file system refused.
    #[error("cannot {action} node key {path}")]
    Io {
        /// "read" or "create".
        action: &'static str,
        /// The key file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The key could not be generated or used by TLS.
    #[error("cannot make a node key or its certificate")]
    Generate(#[source] rcgen::Error),
    /// TLS cannot use the key.
    #[error("cannot use the node key for TLS")]
    Tls(#[from] rustls::Error),
}

/// The node's private key with its certificate, ready for TLS. Cheap to clone; its `Debug` shows the fingerprint only.
#[derive(Clone)]
pub struct NodeKey {
    certified: Arc<CertifiedKey>,
    fingerprint: Fingerprint,
    reset: Arc<ResetKey>,
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("NodeKey").field(&self.fingerprint).finish()
    }
}

impl NodeKey {
    /// A new key in memory only.
    pub fn generate() -> Result<Self, IdentityError> {
        Self::from_pair(&new_pair()?)
    }

    /// Reads the key at `path`.
    pub fn load(path: &Path) -> Result<Self, IdentityError> {
        Self::from_pair(&read_pair(path)?)
    }

    /// Reads the key at `path`, creating it if there is none. If two processes create it at once, both end with one key.
    pub fn load_or_create(path: &Path) -> Result<Self, IdentityError> {
        match Self::load(path) {
            Err(IdentityError::Missing { .. }) => {}
            loaded => return loaded,
        }
        let pair = new_pair()?;
        match write_new(path, pair.serialize_pem().as_bytes()) {
            Ok(()) => Self::from_pair(&pair),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Self::load(path),
            Err(source) => Err(io_error("create", path, source)),
        }
    }

    /// What peers pin.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    pub(super) fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }

    /// See [`super::reset`].
    pub(super) fn reset(&self) -> Arc<ResetKey> {
        self.reset.clone()
    }

    fn from_pair(pair: &KeyPair) -> Result<Self, IdentityError> {
        let mut params = CertificateParams::new(vec![CERT_NAME.to_owned()]).map_err(IdentityError::Generate)?;
        params.distinguished_name.push(DnType::CommonName, CERT_NAME);
        let cert = CertificateDer::from(params.self_signed(pair).map_err(IdentityError::Generate)?);
        let reset = Arc::new(ResetKey::new(&pair.serialize_der()));
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialize_der()));
        let signer = rustls::crypto::ring::sign::any_supported_type(&der)?;
        // Taken from the certificate, by the very function that will judge it at the other end.
        let fingerprint = Fingerprint::of_certificate(&cert)?;
        Ok(Self { certified: Arc::new(CertifiedKey::new(vec![cert], signer)), fingerprint, reset })
    }
}

fn new_pair() -> Result<KeyPair, IdentityError> {
    KeyPair::generate_for(&PKCS_ED25519).map_err(IdentityError::Generate)
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> IdentityError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound if action == "read" => IdentityError::Missing { path },
        _ => IdentityError::Io { action, path, source },
    }
}

fn read_pair(path: &Path) -> Result<KeyPair, IdentityError> {
    let damaged = |source| IdentityError::Damaged { path: path.to_owned(), source };
    let file = File::open(path).map_err(|e| io_error("read", path, e))?;
    // Asked of the open file, not of the path: what is checked is what is read.
    let meta = file.metadata().map_err(|e| io_error("read", path, e))?;
    let mode = meta.mode() & 0o7777;
    if !meta.is_file() || meta.len() > KEY_FILE_MAX {
        return Err(damaged(None));
    }
    if mode & 0o077 != 0 {
        return Err(IdentityError::Exposed { path: path.to_owned(), mode });
    }
    let mut bytes = Vec::new();
    file.take(KEY_FILE_MAX).read_to_end(&mut bytes).map_err(|e| io_error("read", path, e))?;
    let pem = std::str::from_utf8(&bytes).map_err(|_| damaged(None))?;
    KeyPair::from_pkcs8_pem_and_sign_algo(pem, &PKCS_ED25519).map_err(|e| damaged(Some(e)))
}

/// Written under a temporary name (mode 0600, `O_EXCL`), synced, then given its name only if that is still free:
/// a crash leaves no key or a whole one.
fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let mut temp = tempfile::Builder::new().prefix(".node.key.").tempfile_in(dir)?;
    temp.write_all(bytes)?;
    temp.as_file().sync_all()?;
    temp.persist_noclobber(path).map_err(|e| e.error)?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn created_once_private_and_stable() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.key");
        let first = NodeKey::load_or_create(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        for again in [NodeKey::load_or_create(&path), NodeKey::load(&path)] {
            assert_eq!(again.unwrap().fingerprint(), first.fingerprint());
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no leftovers");
        let other = NodeKey::generate().unwrap();
        assert_ne!(other.fingerprint(), first.fingerprint());
    }

    #[test]
    fn creation_race_has_one_winner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.key");
        fs::write(&path, b"first").unwrap();
        let lost = write_new(&path, b"second").unwrap_err();
        assert_eq!(lost.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"first");
    }

    #[test]
    fn exposed_key_is_refused_and_says_chmod() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.key");
        NodeKey::load_or_create(&path).unwrap();
        for mode in [0o640, 0o604, 0o660, 0o610] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let error = NodeKey::load(&path).unwrap_err();
            assert!(matches!(error, IdentityError::Exposed { mode: m, .. } if m == mode));
            assert!(error.to_string().contains("chmod 600"), "{error}");
        }
    }

    #[test]
    fn damage_is_reported_and_the_file_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.key");
        NodeKey::load_or_create(&path).unwrap();
        let good = fs::read(&path).unwrap();
        let mut flipped = good.clone();
        flipped[60] ^= 0x40;
        let huge = vec![b'A'; KEY_FILE_MAX as usize + 1];
        for bad in [&b""[..], &good[..good.len() / 2], &flipped, b"\xff\xfe", &huge] {
            fs::write(&path, bad).unwrap();
            let error = NodeKey::load_or_create(&path).unwrap_err();
            assert!(matches!(error, IdentityError::Damaged { .. }), "{error:?}");
            assert!(error.to_string().contains("restore it from a backup"));
            assert_eq!(fs::read(&path).unwrap(), bad, "never overwritten");
        }
        let missing = NodeKey::load(&dir.path().join("none")).unwrap_err();
        assert!(matches!(missing, IdentityError::Missing { .. }));
    }

    #[test]
    fn fingerprint_text_round_trips() {
        let print = NodeKey::generate().unwrap().fingerprint();
        let text = print.to_string();
        assert_eq!(text.len(), 52);
        assert_eq!(text.to_ascii_uppercase().parse(), Ok(print));
        assert_eq!(text, text.to_ascii_lowercase());
        let json = serde_json::to_string(&print).unwrap();
        assert_eq!(json, format!("\"{text}\""));
        assert_eq!(serde_json::from_str::<Fingerprint>(&json).unwrap(), print);
        for bad in ["", "0189", "aaaa", &text[..51], &format!("{text}a")] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
    }
}
