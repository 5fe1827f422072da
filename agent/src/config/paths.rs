//! Roots must not overlap, and the state directory must lie apart from them: otherwise a mirror would mirror itself.
//!
//! Checked twice: by name on the text, and on disk after symlinks are resolved.

use std::path::{Path, PathBuf};

use super::Config;
use super::parse::Spans;
use super::problem::{Located, ProblemKind};

/// Every overlap between the paths of `config`, each path seen through `view`.
pub(super) fn overlaps(config: &Config, spans: &Spans, view: impl Fn(&Path) -> PathBuf) -> Vec<Located> {
    let mut problems = Vec::new();
    let state = view(&config.state);
    let roots: Vec<PathBuf> = config.mirrors.iter().map(|mirror| view(&mirror.root)).collect();
    let name = |index: usize| config.mirrors[index].name.to_string();
    for (index, root) in roots.iter().enumerate() {
        let mirror = name(index);
        if state.starts_with(root) {
            let kind = ProblemKind::StateInRoot { mirror };
            problems.push(Located { span: spans.state.clone(), kind });
        } else if root.starts_with(&state) {
            let kind = ProblemKind::RootInState { mirror };
            problems.push(Located { span: spans.roots[index].clone(), kind });
        }
        for (before, other) in roots[..index].iter().enumerate() {
            let (first, second) = (name(before), name(index));
            let kind = if root == other {
                ProblemKind::SameRoot { first, second }
            } else if root.starts_with(other) {
                ProblemKind::RootInRoot { inner: second, outer: first }
            } else if other.starts_with(root) {
                ProblemKind::RootInRoot { inner: first, outer: second }
            } else {
                continue;
            };
            problems.push(Located { span: spans.roots[index].clone(), kind });
        }
    }
    problems
}

/// The path with symlinks resolved as far as it exists: a root may be created later.
pub(super) fn resolve(path: &Path) -> PathBuf {
    path.ancestors()
        .find_map(|above| {
            let resolved = above.canonicalize().ok()?;
            let below = path.strip_prefix(above).ok()?;
            Some(if below.as_os_str().is_empty() { resolved } else { resolved.join(below) })
        })
        .unwrap_or_else(|| path.to_owned())
}
