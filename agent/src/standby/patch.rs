//! Patching a file in place, with the page trees of recently patched files at hand.
//!
//! A tree of 32 bytes a page lets the content's name be computed from the pages that changed; only the first patch of a file reads all of it.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs as rfs;
use rustix::io::Errno;
use serde_bytes::ByteBuf;
use twinbox_protocol::content::{PAGE, PageTree, TreeHasher};
use twinbox_protocol::ids::ContentHash;
use twinbox_resync::rows::Local;

use super::copy;
use crate::tree;

/// Most bytes of page trees kept: the trees of 2 GiB of files.
const TREES_BYTES: usize = 16 * 1024 * 1024;

/// Trees of recently patched files.
#[derive(Default)]
pub(super) struct Trees {
    kept: VecDeque<(ContentHash, Local, PageTree)>,
    bytes: usize,
}

impl Trees {
    fn take(&mut self, hash: ContentHash, local: Local) -> Option<PageTree> {
        let at = self.kept.iter().position(|(h, l, _)| (*h, *l) == (hash, local))?;
        let (_, _, tree) = self.kept.remove(at)?;
        self.bytes -= tree.values().len() * 32;
        Some(tree)
    }

    /// Keeps the tree of a file in the state `local`.
    pub(super) fn keep(&mut self, hash: ContentHash, local: Local, tree: PageTree) {
        self.bytes += tree.values().len() * 32;
        self.kept.push_back((hash, local, tree));
        while self.bytes > TREES_BYTES {
            let Some((_, _, old)) = self.kept.pop_front() else { return };
            self.bytes -= old.values().len() * 32;
        }
    }
}

/// Reads a whole file.
pub(super) fn read_tree(file: &File) -> io::Result<(ContentHash, Option<PageTree>)> {
    let mut hasher = TreeHasher::default();
    let mut buffer = vec![0; 256 * 1024];
    let mut at = 0;
    loop {
        let got = file.read_at(&mut buffer, at)?;
        if got == 0 {
            return Ok(hasher.finish());
        }
        hasher.update(&buffer[..got]);
        at += got as u64;
    }
}

/// Writes the ranges and sets the length.
pub(super) fn write(file: &File, writes: &[(u64, ByteBuf)], size: u64) -> Result<(), Errno> {
    for (offset, bytes) in writes {
        copy::write_all_at(file.as_fd(), bytes, *offset)?;
    }
    rfs::ftruncate(file, size)
}

/// The name of the content a patched file has now, and its tree: from the tree before where there is one.
pub(super) fn name_after(
    file: &File,
    before: Option<PageTree>,
    writes: &[(u64, ByteBuf)],
    size: u64,
) -> io::Result<(ContentHash, Option<PageTree>)> {
    let page = PAGE as u64;
    let Some(mut tree) = before.filter(|_| size > page) else { return read_tree(file) };
    let old = tree.content_len();
    let mut stale: Vec<(u64, u64)> =
        writes.iter().filter(|(_, b)| !b.is_empty()).map(|(o, b)| (o / page, (o + b.len() as u64).div_ceil(page))).collect();
    if size != old {
        let from = old.min(size);
        stale.push((from / page, size.div_ceil(page)));
    }
    stale.sort_unstable();
    let mut next = 0;
    let mut buffer = vec![0; 64 * PAGE];
    for (first, end) in stale {
        let mut at = first.max(next);
        while at < end {
            let take = ((end - at) * page).min(buffer.len() as u64).min(size - at * page) as usize;
            file.read_exact_at(&mut buffer[..take], at * page)?;
            tree.replace(at * page, &buffer[..take]);
            at += (take as u64).div_ceil(page);
        }
        next = next.max(end);
    }
    match tree.with_len(size) {
        Some(tree) => Ok((tree.root(), Some(tree))),
        None => read_tree(file),
    }
}

/// What checking a file before a patch gave.
pub(super) enum Base {
    /// It holds the content wanted; its tree, if it is longer than a page.
    Good(Option<PageTree>),
    /// It holds something else.
    Other,
}

/// Whether the file holds `base`. `known`: what the manifest knows of the file, if that is still true.
pub(super) fn check(file: &File, base: ContentHash, known: Option<Local>, trees: &mut Trees) -> io::Result<Base> {
    let local = tree::local(&rfs::fstat(file)?);
    if known == Some(local)
        && let Some(tree) = trees.take(base, local)
    {
        return Ok(Base::Good(Some(tree)));
    }
    let (hash, tree) = read_tree(file)?;
    Ok(if hash == base { Base::Good(tree) } else { Base::Other })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_name_after_a_patch_is_that_of_the_bytes(
            len in 1usize..40_000,
            size in 0usize..50_000,
            ranges in proptest::collection::vec((0usize..45_000, 1usize..9000), 0..4),
        ) {
            let file = tempfile::tempfile().unwrap();
            let mut bytes: Vec<u8> = (0..len).map(|i| (i * 7 / 3) as u8).collect();
            file.write_all_at(&bytes, 0).unwrap();
            let before = read_tree(&file).unwrap().1;
            let (mut writes, mut from) = (vec![], 0);
            let mut ranges = ranges;
            ranges.sort_unstable();
            for (offset, count) in ranges {
                if offset >= from && offset + count <= size {
                    writes.push((offset as u64, ByteBuf::from(vec![0xA5; count])));
                    from = offset + count;
                }
            }
            write(&file, &writes, size as u64).unwrap();
            bytes.resize(bytes.len().max(size), 0);
            for (offset, data) in &writes {
                bytes[*offset as usize..*offset as usize + data.len()].copy_from_slice(data);
            }
            bytes.truncate(size);
            prop_assert_eq!(name_after(&file, before, &writes, size as u64).unwrap().0, ContentHash::of(&bytes));
        }
    }
}
