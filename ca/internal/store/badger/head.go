package badger

// The head: a small file beside Badger's that says up to where writes have been
// acknowledged. Badger cuts its log at the first record that it cannot read,
// and says nothing; the head knows what must be there. It has two slots,
// written in turn, so that one of them is whole whatever happens to the other;
// they are never moved or extended, so that a sync has no metadata to write.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"syscall"
)

const (
	headName = "HEAD"
	// slotBytes is a page and a block: one slot tears without the other.
	slotBytes = 4096
	// A slot: magic (8), serial (8), flags (4), point, checksum (4).
	headBytes = 8 + 8 + 4 + pointBytes + 4
)

var headMagic = []byte("merlonH2")

const headClean = 1 // flag: the store was closed

// headSlot is what one slot says.
type headSlot struct {
	serial uint64 // of the writes; the higher one counts
	clean  bool   // the store was closed; all of it is in Badger's tables
	// tip is the last point that was acknowledged; at revision 0 a store is
	// being laid out, and nothing has been.
	tip point
}

func (h headSlot) encode() []byte {
	b := append(make([]byte, 0, headBytes), headMagic...)
	b = binary.BigEndian.AppendUint64(b, h.serial)
	var flags uint32
	if h.clean {
		flags = headClean
	}
	b = h.tip.append(binary.BigEndian.AppendUint32(b, flags))
	return binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// decodeHeadSlot tells whether b is a whole slot, and what it says.
func decodeHeadSlot(b []byte) (headSlot, bool) {
	if len(b) < headBytes || string(b[:8]) != string(headMagic) {
		return headSlot{}, false
	}
	end := headBytes - 4
	if crc32.Checksum(b[:end], castagnoli) != binary.BigEndian.Uint32(b[end:]) {
		return headSlot{}, false
	}
	flags := binary.BigEndian.Uint32(b[16:])
	h := headSlot{serial: binary.BigEndian.Uint64(b[8:]), clean: flags == headClean, tip: decodePoint(b[20:])}
	return h, flags <= headClean
}

// decodeHead returns the latest whole slot of a head file.
func decodeHead(b []byte) (latest headSlot, ok bool) {
	for at := 0; at < 2*slotBytes && at < len(b); at += slotBytes {
		if h, whole := decodeHeadSlot(b[at:]); whole && (!ok || h.serial > latest.serial) {
			latest, ok = h, true
		}
	}
	return latest, ok
}

// errNoHead is returned where there is no head, or none that is whole.
var errNoHead = errors.New("the file " + headName + " is missing or unreadable")

// readHead reads the head of the store in dir.
func readHead(dir string) (headSlot, error) {
	f, err := os.Open(filepath.Join(dir, headName))
	if errors.Is(err, os.ErrNotExist) {
		return headSlot{}, errNoHead
	}
	if err != nil {
		return headSlot{}, err
	}
	defer f.Close()
	b := make([]byte, 2*slotBytes)
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return headSlot{}, fmt.Errorf("read %s: %w", headName, err)
	}
	h, ok := decodeHead(b[:n])
	if !ok {
		return headSlot{}, errNoHead
	}
	return h, nil
}

// head is an open head file. One goroutine at a time writes it.
type head struct {
	file   *os.File
	serial uint64 // of the last write
	// sync is fdatasync; a field only so that a test can let it fail.
	sync func() error
}

// openHead opens the head file for writing, after what is known of it has been
// read; it makes one where there is none.
func openHead(dir string, last headSlot) (*head, error) {
	f, err := os.OpenFile(filepath.Join(dir, headName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	h := &head{file: f, serial: last.serial, sync: func() error { return dataSync(f) }}
	if err := h.allocate(); err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", headName, err), f.Close())
	}
	return h, nil
}

// allocate gives the file its blocks. A file of the full size has them.
func (h *head) allocate() error {
	info, err := h.file.Stat()
	if err != nil {
		return err
	}
	if missing := 2*slotBytes - info.Size(); missing > 0 {
		if _, err := h.file.WriteAt(make([]byte, missing), info.Size()); err != nil {
			return err
		}
	}
	return h.file.Sync()
}

// write says durably that all up to tip is acknowledged. After an error
// nothing is known of the slot.
func (h *head) write(tip point, clean bool) error {
	h.serial++
	slot := headSlot{serial: h.serial, clean: clean, tip: tip}
	if _, err := h.file.WriteAt(slot.encode(), int64(h.serial%2)*slotBytes); err != nil {
		return fmt.Errorf("write %s: %w", headName, err)
	}
	if err := h.sync(); err != nil {
		return fmt.Errorf("sync %s: %w", headName, err)
	}
	return nil
}

func (h *head) close() error { return h.file.Close() }

// dataSync makes the content of f durable; its size does not change.
func dataSync(f *os.File) error {
	for {
		if err := syscall.Fdatasync(int(f.Fd())); !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}
