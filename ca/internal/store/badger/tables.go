package badger

// A look at Badger's manifest, tables and logs before Badger opens them. Over a table
// that was cut short Badger ends the process (log.Fatal), over a bad length in a
// block it panics where nobody can recover, and a table whose checksum does not
// match it may leave out and go on.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"runtime"

	bdg "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/fb"
	"github.com/dgraph-io/badger/v4/pb"
	"github.com/dgraph-io/badger/v4/table"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
)

// checkTables makes sure that every table which the manifest names is there and
// whole, each block of it.
func checkTables(dir string, opts bdg.Options) error {
	f, err := os.Open(filepath.Join(dir, bdg.ManifestFilename))
	if err != nil {
		return fmt.Errorf("manifest of Badger: %w", err)
	}
	defer f.Close()
	manifest, _, err := bdg.ReplayManifestFile(f, opts.ExternalMagicVersion, opts)
	if err != nil {
		return fmt.Errorf("manifest of Badger: %w", err)
	}
	var group errgroup.Group
	group.SetLimit(runtime.GOMAXPROCS(0))
	for id := range manifest.Tables {
		group.Go(func() error {
			if err := checkTable(table.NewFilename(id, dir)); err != nil {
				return fmt.Errorf("table %d: %w", id, err)
			}
			return nil
		})
	}
	return group.Wait()
}

// checkTable reads a table from its end: length of the checksum (4 bytes),
// checksum, length of the index (4), index. The index leads to the blocks, which
// end likewise.
func checkTable(path string) (err error) {
	defer func() {
		if p := recover(); p != nil { // a length that leads out of bounds
			err = fmt.Errorf("damaged: %v", p)
		}
	}()
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var sum, index []byte
	if b, sum, err = takeLast(b); err == nil {
		b, index, err = takeLast(b)
	}
	if err != nil {
		return fmt.Errorf("its end is damaged: %w", err)
	}
	if err := checkSum(index, sum); err != nil {
		return fmt.Errorf("its index is damaged: %w", err)
	}
	blocks := fb.GetRootAsTableIndex(index, 0)
	if blocks.OffsetsLength() == 0 {
		return errors.New("its index names no block")
	}
	for i := range blocks.OffsetsLength() {
		var at fb.BlockOffset
		blocks.Offsets(&at, i)
		if uint64(at.Offset())+uint64(at.Len()) > uint64(len(b)) {
			return fmt.Errorf("block %d is missing", i)
		}
		block, sum, err := takeLast(b[at.Offset() : at.Offset()+at.Len()])
		if err == nil {
			err = checkSum(block, sum)
		}
		if err != nil {
			return fmt.Errorf("block %d is damaged: %w", i, err)
		}
	}
	return nil
}

// takeLast takes off the end of b what its last four bytes give the length of.
func takeLast(b []byte) (rest, last []byte, err error) {
	end := len(b) - 4
	if end < 0 {
		return nil, nil, fmt.Errorf("only %d bytes are left", len(b))
	}
	n := binary.BigEndian.Uint32(b[end:])
	if uint64(n) > uint64(end) {
		return nil, nil, fmt.Errorf("%d bytes are to be read where %d are left", n, end)
	}
	return b[:end-int(n)], b[end-int(n) : end], nil
}

// checkSum holds b against the checksum that Badger wrote beside it.
func checkSum(b, encoded []byte) error {
	var sum pb.Checksum
	if err := proto.Unmarshal(encoded, &sum); err != nil {
		return fmt.Errorf("checksum: %w", err)
	}
	if sum.Algo != pb.Checksum_CRC32C || uint64(crc32.Checksum(b, castagnoli)) != sum.Sum {
		return errors.New("its checksum does not match")
	}
	return nil
}

// checkLogs looks at the heads of Badger's logs, which say how they are
// encrypted: not at all. What follows Badger checks by itself.
func checkLogs(dir string) error {
	logs, err := filepath.Glob(filepath.Join(dir, "*"+memExt))
	if err != nil {
		return err
	}
	for _, path := range logs {
		if err := checkLogHead(path); err != nil {
			return fmt.Errorf("log %s: %w", filepath.Base(path), err)
		}
	}
	return nil
}

// logHeadBytes are the number of an encryption key (8 bytes) and a random one.
const logHeadBytes = 8 + 12

func checkLogHead(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	var b [logHeadBytes]byte
	if _, err := io.ReadFull(f, b[:]); err != nil {
		return fmt.Errorf("its beginning is missing: %w", err)
	}
	if binary.BigEndian.Uint64(b[:]) != 0 {
		return errors.New("its beginning is damaged")
	}
	return nil
}
