// Names of users and groups, from the files of this machine. No name service is
// asked: a slow one would hold up every answer, and a false one would hand out
// identities.

package workload

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// maxNamesBytes is the size of the largest passwd or group file that is read.
const maxNamesBytes = 16 << 20

// errUnnamed: users and groups need no name, least of all those of containers.
var errUnnamed = errors.New("no name")

// names are those of one file, /etc/passwd or /etc/group, read again when it
// has changed. It is safe for concurrent use.
type names struct {
	path string

	mu sync.Mutex
	// guarded by mu
	version fileID
	byID    map[uint32]string // "" where the file gives two
}

// of returns the name of id.
func (n *names) of(id uint32) (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var st unix.Stat_t
	if err := unix.Stat(n.path, &st); err != nil {
		return "", fmt.Errorf("read %s: %v", n.path, err)
	}
	if version := fileIDOf(&st); n.byID == nil || version != n.version {
		byID, err := readNames(n.path)
		if err != nil {
			return "", err
		}
		n.byID, n.version = byID, version
	}
	name, ok := n.byID[id]
	switch {
	case !ok:
		return "", errUnnamed
	case name == "":
		return "", fmt.Errorf("%s has several names for %d", n.path, id)
	}
	return name, nil
}

func readNames(path string) (map[uint32]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxNamesBytes+1))
	if err != nil {
		return nil, err
	}
	if len(b) > maxNamesBytes {
		return nil, errors.New(path + " is too large")
	}
	return parseNames(b), nil
}

// parseNames reads lines NAME:PASSWORD:ID:…, as passwd(5) and group(5) have in
// common. Lines of another form, such as those of NIS, name nobody.
func parseNames(b []byte) map[uint32]string {
	byID := make(map[uint32]string)
	for line := range bytes.Lines(b) {
		fields := bytes.SplitN(bytes.TrimSuffix(line, []byte("\n")), []byte(":"), 4)
		if len(fields) < 4 || !plainName(fields[0]) {
			continue
		}
		id, err := strconv.ParseUint(string(fields[2]), 10, 32)
		if err != nil {
			continue
		}
		name := string(fields[0])
		if known, ok := byID[uint32(id)]; ok && known != name {
			name = ""
		}
		byID[uint32(id)] = name
	}
	return byID
}

// plainName refuses what no tool that adds users would, and what would not fit
// into a selector.
func plainName(b []byte) bool {
	if len(b) == 0 || len(b) > 256 || bytes.ContainsAny(b[:1], "+-#") {
		return false
	}
	return !bytes.ContainsFunc(b, func(r rune) bool { return r <= ' ' || r > '~' })
}
