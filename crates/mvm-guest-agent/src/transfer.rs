//! `cp`, both ways: tar streams between the protocol and the file system.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use mvm_guest_api::proto::{Chunk, UploadInput, UploadReply, upload_input};
use mvm_guest_api::{archive, limits};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

/// How long the caller may keep quiet in the middle of an upload.
const IDLE: Duration = Duration::from_secs(60);

fn absolute(path: &str) -> Result<PathBuf, Status> {
    if !path.starts_with('/') || path.contains('\0') || path.len() > limits::MAX_PATH {
        return Err(Status::invalid_argument("the path is not an absolute path of the guest"));
    }
    Ok(Path::new(path).to_owned())
}

/// Unpacks what the caller sends.
///
/// # Errors
/// When the stream is refused or cannot be written.
pub async fn upload(mut input: Streaming<UploadInput>) -> Result<UploadReply, Status> {
    let quiet = |_| Status::deadline_exceeded("nothing was sent for 60 s");
    let first = tokio::time::timeout(IDLE, input.message()).await.map_err(quiet)??;
    let Some(upload_input::Kind::Start(start)) = first.and_then(|message| message.kind) else {
        return Err(Status::invalid_argument("the first message is not a start message"));
    };
    let path = absolute(&start.path)?;
    let (chunks, receiver) = mpsc::channel::<Bytes>(4);
    let unpacking = tokio::task::spawn_blocking(move || {
        let mut reader = ChunkReader { receiver, current: Bytes::new() };
        let copied = archive::unpack(&mut reader, &path)?;
        // Padding behind the end of the archive.
        io::copy(&mut reader, &mut io::sink())?;
        Ok::<_, io::Error>(copied)
    });
    let fed = async {
        while let Some(message) = tokio::time::timeout(IDLE, input.message()).await.map_err(quiet)?? {
            let Some(upload_input::Kind::Data(bytes)) = message.kind else {
                return Err(Status::invalid_argument("a second start message"));
            };
            if chunks.send(bytes).await.is_err() {
                break;
            }
        }
        Ok(())
    }
    .await;
    drop(chunks);
    let unpacked = unpacking.await.map_err(|error| Status::internal(error.to_string()))?;
    fed?;
    let copied = unpacked.map_err(|error| refused(&error))?;
    Ok(UploadReply { files: copied.entries, bytes: copied.bytes })
}

fn refused(error: &io::Error) -> Status {
    let text: String = error.to_string().chars().take(limits::MAX_WORD).collect();
    match error.kind() {
        io::ErrorKind::NotFound => Status::not_found(text),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Status::permission_denied(text),
        io::ErrorKind::StorageFull => Status::resource_exhausted(text),
        _ => Status::failed_precondition(text),
    }
}

/// Packs a path; the stream ends with an error where packing did.
///
/// # Errors
/// When the path cannot be.
pub fn download(path: &str) -> Result<mpsc::Receiver<Result<Chunk, Status>>, Status> {
    let path = absolute(path)?;
    let (sender, receiver) = mpsc::channel(4);
    tokio::task::spawn_blocking(move || {
        let mut writer = ChunkWriter { sender: sender.clone(), buffer: Vec::with_capacity(limits::CHUNK) };
        if let Err(error) = archive::pack(&path, &mut writer) {
            // The receiver may be the reason for the error.
            let _ = sender.blocking_send(Err(refused(&error)));
        }
    });
    Ok(receiver)
}

struct ChunkReader {
    receiver: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Read for ChunkReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.receiver.blocking_recv() {
                Some(bytes) => self.current = bytes,
                None => return Ok(0),
            }
        }
        let count = self.current.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.current.split_to(count));
        Ok(count)
    }
}

struct ChunkWriter {
    sender: mpsc::Sender<Result<Chunk, Status>>,
    buffer: Vec<u8>,
}

impl ChunkWriter {
    fn pass_on(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let full = std::mem::replace(&mut self.buffer, Vec::with_capacity(limits::CHUNK));
        self.sender.blocking_send(Ok(Chunk { data: full.into() })).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for ChunkWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(limits::CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..count]);
        if self.buffer.len() == limits::CHUNK {
            self.pass_on()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.pass_on()
    }
}
