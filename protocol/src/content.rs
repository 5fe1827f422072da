//! Names of bytes, and the page tree of large files.
//!
//! A content's name is plain BLAKE3. BLAKE3 is itself a tree over 1 KiB chunks, so the chaining value of each aligned 4 KiB page is an
//! inner node of it (BLAKE3 paper §2.5; `blake3::hazmat`). Keeping those values lets us find the pages that changed, and compute
//! the new name from the changed pages alone.

use blake3::Hasher;
use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};

use crate::ids::ContentHash;

/// Bytes of a page, the grain in which in-place changes are found.
pub const PAGE: usize = 4096;

/// Chaining values of a file's pages: 32 bytes for each 4 KiB. Only for contents longer than one page.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct PageTree {
    len: u64,
    values: Vec<ChainingValue>,
}

/// Chaining value of the page `bytes` that starts at byte `offset` (a multiple of [`PAGE`]).
#[must_use]
pub fn page_value(offset: u64, bytes: &[u8]) -> ChainingValue {
    let mut hasher = Hasher::new();
    hasher.set_input_offset(offset);
    hasher.update(bytes);
    hasher.finalize_non_root()
}

impl PageTree {
    /// Takes values read back from storage; `None` when their number does not fit `len`.
    #[must_use]
    pub fn from_parts(len: u64, values: Vec<ChainingValue>) -> Option<Self> {
        (len > PAGE as u64 && values.len() as u64 == len.div_ceil(PAGE as u64)).then_some(PageTree { len, values })
    }

    /// Takes the concatenated values of [`PageTree::to_bytes`].
    #[must_use]
    pub fn from_bytes(len: u64, bytes: &[u8]) -> Option<Self> {
        let (values, rest) = bytes.as_chunks::<32>();
        if !rest.is_empty() {
            return None;
        }
        Self::from_parts(len, values.to_vec())
    }

    /// The values, concatenated.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.values.concat()
    }

    /// Length of the content in bytes.
    #[must_use]
    pub fn content_len(&self) -> u64 {
        self.len
    }

    /// The values, one a page.
    #[must_use]
    pub fn values(&self) -> &[ChainingValue] {
        &self.values
    }

    /// The content's name.
    #[must_use]
    pub fn root(&self) -> ContentHash {
        let left = left_subtree_len(self.len);
        let split = (left / PAGE as u64) as usize;
        let (a, b) = (subtree(&self.values[..split], left), subtree(&self.values[split..], self.len - left));
        ContentHash(*merge_subtrees_root(&a, &b, Mode::Hash).as_bytes())
    }

    /// Replaces the pages that `bytes`, starting at byte `offset` (a multiple of [`PAGE`]), cover; the content is `len` long after
    /// all replacements. Pages past the end are cut off, new ones must be given in order.
    pub fn replace(&mut self, offset: u64, bytes: &[u8]) {
        let first = (offset / PAGE as u64) as usize;
        for (at, page) in bytes.chunks(PAGE).enumerate() {
            let value = page_value((first + at) as u64 * PAGE as u64, page);
            match self.values.get_mut(first + at) {
                Some(slot) => *slot = value,
                None => self.values.push(value),
            }
        }
    }

    /// Sets the length after replacements; `None` when pages are missing or one page is left (such contents have no tree).
    #[must_use]
    pub fn with_len(mut self, len: u64) -> Option<Self> {
        self.values.truncate(len.div_ceil(PAGE as u64) as usize);
        Self::from_parts(len, self.values)
    }
}

/// Chaining value of a subtree that is not the whole: `values` cover `len` bytes.
fn subtree(values: &[ChainingValue], len: u64) -> ChainingValue {
    if let [one] = values {
        return *one;
    }
    let left = left_subtree_len(len);
    let split = (left / PAGE as u64) as usize;
    merge_subtrees_non_root(&subtree(&values[..split], left), &subtree(&values[split..], len - left), Mode::Hash)
}

/// Feeds a content in order and gives its name and, where it is longer than a page, its tree.
#[derive(Default)]
pub struct TreeHasher {
    len: u64,
    values: Vec<ChainingValue>,
    partial: Vec<u8>,
    partial_first: Option<Box<[u8]>>,
}

impl TreeHasher {
    /// Takes the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        if !self.partial.is_empty() {
            let take = bytes.len().min(PAGE - self.partial.len());
            self.partial.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.partial.len() == PAGE {
                let page = std::mem::take(&mut self.partial);
                self.page(&page);
            }
        }
        let (pages, rest) = bytes.as_chunks::<PAGE>();
        for page in pages {
            self.page(page);
        }
        self.partial.extend_from_slice(rest);
    }

    fn page(&mut self, page: &[u8]) {
        self.values.push(page_value(self.len, page));
        self.len += page.len() as u64;
        if self.len == PAGE as u64 {
            // A content of exactly one page has no inner node: keep its bytes until a second page comes.
            self.partial_first = Some(page.into());
        } else {
            self.partial_first = None;
        }
    }

    /// The name, and the tree when the content is longer than one page.
    #[must_use]
    pub fn finish(mut self) -> (ContentHash, Option<PageTree>) {
        if self.len == 0 {
            return (ContentHash::of(&self.partial), None);
        }
        if self.partial.is_empty()
            && let Some(page) = &self.partial_first
        {
            return (ContentHash::of(page), None);
        }
        if !self.partial.is_empty() {
            let page = std::mem::take(&mut self.partial);
            self.page(&page);
        }
        let tree = PageTree { len: self.len, values: self.values };
        (tree.root(), Some(tree))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        Hasher::new().update(&len.to_le_bytes()).finalize_xof().fill(&mut out);
        out
    }

    #[test]
    fn name_is_plain_blake3_at_every_edge() {
        for len in [0, 1, 1023, 1024, 4095, 4096, 4097, 5120, 8191, 8192, 8193, 12288, 65536, 65537, 1 << 20, (1 << 20) + 5] {
            let bytes = noise(len);
            for step in [1usize << 20, 1000, 4096] {
                let mut hasher = TreeHasher::default();
                bytes.chunks(step).for_each(|c| hasher.update(c));
                let (name, tree) = hasher.finish();
                assert_eq!(name, ContentHash::of(&bytes), "{len} by {step}");
                assert_eq!(tree.is_some(), len > PAGE, "{len}");
                if let Some(tree) = tree {
                    assert_eq!(PageTree::from_bytes(tree.content_len(), &tree.to_bytes()), Some(tree));
                }
            }
        }
    }

    proptest! {
        #[test]
        fn replacing_pages_gives_the_name_of_the_new_bytes(len in 4097usize..40_000, new_len in 4097usize..50_000, at in 0usize..10) {
            let old = noise(len);
            let mut new = old.clone();
            new.resize(new_len, 7);
            let page = (at * PAGE).min(new_len - 1) / PAGE * PAGE;
            let end = (page + PAGE).min(new_len);
            new[page..end].fill(9);
            let mut hasher = TreeHasher::default();
            hasher.update(&old);
            let mut tree = hasher.finish().1.unwrap();
            tree.replace(page as u64, &new[page..end]);
            let from = (len.min(new_len) - 1) / PAGE * PAGE;
            tree.replace(from as u64, &new[from..]);
            prop_assert_eq!(tree.with_len(new_len as u64).unwrap().root(), ContentHash::of(&new));
        }
    }
}
