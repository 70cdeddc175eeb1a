//! Which parts of a memory have to be written; pure.

use std::ops::Range;

/// The granularity of everything here, in bytes: the smallest page of the host.
pub(super) const PAGE: usize = 4096;

static ZEROS: [u8; PAGE] = [0; PAGE];

/// Splits a buffer into alternating runs of pages; the flag tells whether the run is all zero.
///
/// A last, partial page counts as a page.
pub(super) fn page_runs(buffer: &[u8]) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    for (index, page) in buffer.chunks(PAGE).enumerate() {
        let start = index * PAGE;
        let zero = *page == ZEROS[..page.len()];
        match runs.last_mut() {
            Some((run, same)) if *same == zero => run.end = start + page.len(),
            _ => runs.push((start..start + page.len(), zero)),
        }
    }
    runs
}

/// An entry of `/proc/<pid>/pagemap` (Documentation/admin-guide/mm/pagemap.rst).
#[derive(Debug, Clone, Copy)]
pub(super) struct PagemapEntry(u64);

impl PagemapEntry {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    /// The page belongs to a file or to shared memory.
    const FILE: u64 = 1 << 61;

    /// Tells whether a page of a private file mapping was written to by the process, so that its content is only there.
    ///
    /// A swapped page of such a mapping is always a written one: a clean one is dropped instead.
    pub(super) fn is_private(self) -> bool {
        self.0 & Self::SWAPPED != 0 || (self.0 & Self::PRESENT != 0 && self.0 & Self::FILE == 0)
    }
}

/// Returns the runs of privately held pages, as byte ranges relative to the first entry, from the raw pagemap.
pub(super) fn private_runs(raw: &[u8]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    for entry in raw.as_chunks::<8>().0 {
        if PagemapEntry(u64::from_ne_bytes(*entry)).is_private() {
            match runs.last_mut() {
                Some(run) if run.end == at => run.end += PAGE as u64,
                _ => runs.push(at..at + PAGE as u64),
            }
        }
        at += PAGE as u64;
    }
    runs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn neighbours_are_one_run() {
        let mut buffer = vec![0; 5 * PAGE];
        buffer[PAGE] = 1;
        buffer[3 * PAGE - 1] = 1;
        assert_eq!(page_runs(&buffer), [(0..PAGE, true), (PAGE..3 * PAGE, false), (3 * PAGE..5 * PAGE, true)]);
    }

    #[test]
    fn only_written_pages_are_private() {
        let clean = PagemapEntry::PRESENT | PagemapEntry::FILE;
        let entries = [0, clean, PagemapEntry::PRESENT, PagemapEntry::SWAPPED, clean, PagemapEntry::PRESENT];
        let raw: Vec<u8> = entries.iter().flat_map(|e: &u64| e.to_ne_bytes()).collect();
        let page = PAGE as u64;
        assert_eq!(private_runs(&raw), [2 * page..4 * page, 5 * page..6 * page]);
    }

    proptest! {
        #[test]
        fn runs_cover_the_buffer_and_tell_the_truth(pages in prop::collection::vec(prop::option::of(0..PAGE), 0..20), tail in 0..PAGE) {
            let mut buffer = vec![0_u8; pages.len() * PAGE + tail];
            for (index, hit) in pages.iter().enumerate() {
                if let Some(offset) = hit {
                    buffer[index * PAGE + offset] = 7;
                }
            }
            let mut at = 0;
            let mut before = None;
            for (run, zero) in page_runs(&buffer) {
                prop_assert_eq!(run.start, at);
                prop_assert_ne!(before, Some(zero));
                for page in buffer[run.clone()].chunks(PAGE) {
                    prop_assert_eq!(page.iter().all(|b| *b == 0), zero);
                }
                at = run.end;
                before = Some(zero);
            }
            prop_assert_eq!(at, buffer.len());
        }

        #[test]
        fn private_runs_are_exactly_the_private_pages(entries in prop::collection::vec(any::<u64>(), 0..200)) {
            let raw: Vec<u8> = entries.iter().flat_map(|e| e.to_ne_bytes()).collect();
            let runs = private_runs(&raw);
            for (index, entry) in entries.iter().enumerate() {
                let at = index as u64 * PAGE as u64;
                let inside = runs.iter().filter(|r| r.contains(&at)).count();
                prop_assert_eq!(inside, usize::from(PagemapEntry(*entry).is_private()));
            }
        }
    }
}
