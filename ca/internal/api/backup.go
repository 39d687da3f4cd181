// BackupStore: the store at one revision, as the bytes of a backup file.

package api

import (
	"bufio"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"merlon.dev/ca/capb"
	"merlon.dev/ca/internal/store"
	"merlon.dev/ca/internal/store/snapshot"
)

// BackedUp is the act in the audit log.
const BackedUp = "back up the store"

// backupBytes is what one message of a backup holds.
const backupBytes = 256 << 10

// BackupStore implements capb.AdminServer. It is an act, although it changes
// nothing: whoever reads all that the CA knows is written down also when the
// connection breaks before the end. ABORTED: the store moved on under
// it, begin again.
func (s *Service) BackupStore(_ *capb.BackupStoreRequest, stream grpc.ServerStreamingServer[capb.BackupStoreResponse]) error {
	ctx := stream.Context()
	out := bufio.NewWriterSize(backupStream{stream}, backupBytes)
	_, err := snapshot.Write(ctx, out, s.opts.Store, s.opts.StoreKind, time.Now())
	if errors.Is(err, store.ErrCompacted) {
		return status.Error(codes.Aborted, "the store dropped the revision while it was being backed up: it is written to faster than it is read")
	}
	if err != nil {
		return err
	}
	return out.Flush()
}

// backupStream implements io.Writer.
type backupStream struct {
	stream grpc.ServerStreamingServer[capb.BackupStoreResponse]
}

func (b backupStream) Write(data []byte) (int, error) {
	for rest := data; len(rest) > 0; {
		n := min(len(rest), backupBytes)
		if err := b.stream.Send(&capb.BackupStoreResponse{Data: rest[:n]}); err != nil {
			return len(data) - len(rest), err
		}
		rest = rest[n:]
	}
	return len(data), nil
}
