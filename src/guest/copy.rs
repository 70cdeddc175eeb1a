//! `cp`: files to and from a guest as tar streams.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use mvm_guest_api::archive::{self, Copied};
use mvm_guest_api::limits;
use mvm_guest_api::proto::{DownloadRequest, UploadInput, UploadStart, upload_input};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::client::refused;
use super::{GuestClient, GuestError};

const UPLOAD: &str = "copy to the guest";
const DOWNLOAD: &str = "copy from the guest";
/// How long nothing may come.
const IDLE: Duration = Duration::from_secs(60);
/// How long a whole upload may take; the guest gives up sooner when nothing comes.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

impl GuestClient {
    /// Copies a file or directory into the guest: below `target` when that is a directory there, or else as `target`.
    ///
    /// # Errors
    /// When something cannot be read here or written there.
    pub fn upload(&mut self, source: &Path, target: &str) -> Result<Copied, GuestError> {
        let (messages, receiver) = mpsc::channel(4);
        let start = upload_input::Kind::Start(UploadStart { path: target.to_owned() });
        let opened = messages.try_send(UploadInput { kind: Some(start) });
        opened.map_err(|_| GuestError::Failed { what: UPLOAD, why: "the line is closed".into() })?;
        let path = source.to_owned();
        let packing = std::thread::spawn(move || {
            let mut writer = ChunkWriter { messages, buffer: Vec::with_capacity(limits::CHUNK) };
            archive::pack(&path, &mut writer)
        });
        let mut agent = self.agent.clone();
        let reply = self.call(UPLOAD, LONGEST, agent.upload(ReceiverStream::new(receiver)));
        let packed = packing.join().map_err(|_| GuestError::Failed { what: UPLOAD, why: "packing stopped".into() })?;
        match (packed, reply) {
            // The guest's refusal breaks the pipe here: its reason is the better one.
            (Err(error), Err(reply)) if error.kind() == io::ErrorKind::BrokenPipe => Err(reply),
            (Err(source), _) => Err(GuestError::Io { what: UPLOAD.into(), source }),
            (Ok(_), Err(reply)) => Err(reply),
            (Ok(copied), Ok(_)) => Ok(copied),
        }
    }

    /// Copies a file or directory out of the guest: below `target` when that is a directory, under the name that `source` ends with;
    /// or else as `target`. Names that the guest gives are used below a directory that was asked for only.
    ///
    /// # Errors
    /// When something cannot be read there or written here.
    pub fn download(&mut self, source: &str, target: &Path) -> Result<Copied, GuestError> {
        let mut agent = self.agent.clone();
        let mut chunks = self.call(DOWNLOAD, IDLE, agent.download(DownloadRequest { path: source.to_owned() }))?;
        let (pieces, receiver) = mpsc::channel(4);
        let (asked, path) = (PathBuf::from(source), target.to_owned());
        let unpacking = std::thread::spawn(move || {
            let mut reader = ChunkReader { receiver, current: Bytes::new() };
            let copied = archive::unpack_asked(&mut reader, &asked, &path)?;
            // Padding behind the end of the archive, and proof that the guest sent all of it.
            io::copy(&mut reader, &mut io::sink())?;
            Ok(copied)
        });
        let fed = self.runtime.block_on(async {
            loop {
                let chunk = tokio::time::timeout(IDLE, chunks.message());
                let timeout = |_| GuestError::Timeout { what: DOWNLOAD, after_ms: IDLE.as_millis() as u64 };
                match chunk.await.map_err(timeout)? {
                    Ok(Some(chunk)) => {
                        if pieces.send(Ok(chunk.data)).await.is_err() {
                            return Ok(());
                        }
                    }
                    Ok(None) => return Ok(()),
                    Err(status) => {
                        // What was sent so far is not all: the unpacking must not take it for that.
                        let _ = pieces.send(Err(io::ErrorKind::ConnectionAborted.into())).await;
                        return Err(refused(DOWNLOAD, &status));
                    }
                }
            }
        });
        drop(pieces);
        let unpacked: io::Result<Copied> =
            unpacking.join().map_err(|_| GuestError::Failed { what: DOWNLOAD, why: "unpacking stopped".into() })?;
        fed?;
        unpacked.map_err(|source| GuestError::Io { what: DOWNLOAD.into(), source })
    }
}

struct ChunkWriter {
    messages: mpsc::Sender<UploadInput>,
    buffer: Vec<u8>,
}

impl Write for ChunkWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(limits::CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..count]);
        if self.buffer.len() == limits::CHUNK {
            self.flush()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let full = std::mem::replace(&mut self.buffer, Vec::with_capacity(limits::CHUNK));
        let message = UploadInput { kind: Some(upload_input::Kind::Data(full.into())) };
        self.messages.blocking_send(message).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

struct ChunkReader {
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    current: Bytes,
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.receiver.blocking_recv() {
                Some(bytes) => self.current = bytes?,
                None => return Ok(0),
            }
        }
        let count = self.current.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.current.split_to(count));
        Ok(count)
    }
}
