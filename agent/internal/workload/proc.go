// Parsing of what /proc says about one process: start time and state, user and
// group, program.

package workload

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// fileID names one version of one file.
type fileID struct {
	dev, ino uint64
	size     int64
	mtime    unix.Timespec
	ctime    unix.Timespec
}

func fileIDOf(st *unix.Stat_t) fileID {
	return fileID{dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim} //nolint:unconvert // 32 bits on other architectures
}

// sameFile ignores the version: permissions and links may change while a
// program runs. Its inode number is not reused as long as it does.
func (f fileID) sameFile(g fileID) bool { return f.dev == g.dev && f.ino == g.ino }

func statExe(dir int) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, "exe", &st, 0); err != nil {
		return fileID{}, err
	}
	return fileIDOf(&st), nil
}

// readAll gives the content of a file below dir to parse.
func readAll(dir int, name string, parse func([]byte) error) error {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%w: read %s: %v", ErrGone, name, err)
	}
	defer unix.Close(fd)
	pooled := buffers.Get().(*[]byte)
	defer buffers.Put(pooled)
	buf := (*pooled)[:0]
	for len(buf) < maxProcBytes {
		if len(buf) == cap(buf) {
			buf = slices.Grow(buf, len(buf))
			*pooled = buf
		}
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%w: read %s: %v", ErrGone, name, err)
		}
		if n == 0 {
			return parse(buf)
		}
		buf = buf[:len(buf)+n]
	}
	return fmt.Errorf("%w: %s is longer than expected", ErrGone, name)
}

func (p *Process) readStart(dir int) error {
	return readAll(dir, "stat", func(b []byte) error {
		var err error
		p.startTicks, err = parseStat(b)
		return err
	})
}

// parseStat reads the start time (field 22) of /proc/PID/stat.
// The second field is the program's name in parentheses, which the process
// chooses itself and which may hold anything, parentheses and blanks included;
// nothing after the last closing parenthesis is its own.
func parseStat(b []byte) (startTicks uint64, err error) {
	end := bytes.LastIndexByte(b, ')')
	if end < 0 {
		return 0, fmt.Errorf("%w: no name in stat", ErrGone)
	}
	fields := bytes.Fields(b[end+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("%w: stat has %d fields", ErrGone, len(fields))
	}
	startTicks, err = strconv.ParseUint(string(fields[19]), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%w: start time in stat: %v", ErrGone, err)
	}
	return startTicks, nil
}

func (p *Process) readIDs(dir int) error {
	return readAll(dir, "status", func(b []byte) error {
		var err error
		p.UID, p.GID, p.Groups, err = parseStatus(b)
		return err
	})
}

// parseStatus reads the effective user and group and the supplementary groups
// from /proc/PID/status. A process that has ended gives ErrGone. The name of the
// process is in the first line, with line breaks escaped by the kernel, so that
// it cannot add lines; a line that comes twice is refused all the same.
func parseStatus(b []byte) (uid, gid uint32, groups []uint32, err error) {
	const uidLine, gidLine, groupsLine = 1, 2, 4
	seen := 0
	for line := range bytes.Lines(b) {
		name, rest, ok := bytes.Cut(line, []byte(":\t"))
		if !ok {
			continue
		}
		this := 0
		switch string(name) {
		case "State":
			// A zombie has no program any more, though other threads of it may
			// still run: nothing certain can be said about it.
			if rest = bytes.TrimSpace(rest); len(rest) > 0 && bytes.IndexByte([]byte("ZXx"), rest[0]) >= 0 {
				return 0, 0, nil, ErrGone
			}
		case "Uid":
			this = uidLine
			uid, err = effective(rest)
		case "Gid":
			this = gidLine
			gid, err = effective(rest)
		case "Groups":
			this = groupsLine
			groups, err = supplementary(rest)
		}
		if err == nil && seen&this != 0 {
			err = fmt.Errorf("%w: two %s lines in status", ErrGone, name)
		}
		if err != nil {
			return 0, 0, nil, err
		}
		seen |= this
	}
	if seen != uidLine|gidLine|groupsLine {
		return 0, 0, nil, fmt.Errorf("%w: no Uid, Gid or Groups in status", ErrGone)
	}
	return uid, gid, groups, nil
}

func supplementary(b []byte) (groups []uint32, err error) {
	for field := range bytes.FieldsSeq(b) {
		id, err := strconv.ParseUint(string(field), 10, 32)
		if err != nil {
			return nil, fmt.Errorf("%w: group in status: %v", ErrGone, err)
		}
		groups = append(groups, uint32(id))
	}
	return groups, nil
}

// effective picks the second of real, effective, saved and filesystem ID.
func effective(b []byte) (uint32, error) {
	fields := bytes.Fields(b)
	if len(fields) != 4 {
		return 0, fmt.Errorf("%w: status lists %d IDs", ErrGone, len(fields))
	}
	id, err := strconv.ParseUint(string(fields[1]), 10, 32)
	if err != nil {
		return 0, fmt.Errorf("%w: ID in status: %v", ErrGone, err)
	}
	return uint32(id), nil
}

// readProgram finds path and digest of the program, or notes why not.
func (a *Attestor) readProgram(ctx context.Context, dir int, p *Process) {
	exe, err := statExe(dir)
	if err != nil {
		hint := ""
		if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
			hint = ": the agent needs root or CAP_SYS_PTRACE to see programs of other users"
		}
		p.note("the program cannot be read (%v)%s", err, hint)
		return
	}
	p.exe = exe
	if path, err := programPath(dir, exe); err != nil {
		p.note("no unix:path selector: %v", err)
	} else {
		p.Path = path
	}
	if p.Read&Digest == 0 {
		return
	}
	if sum, err := a.hashes.of(ctx, p.UID, dir, exe); err != nil {
		p.note("no unix:sha256 selector: %v", err)
	} else {
		p.SHA256 = sum
	}
}

// programPath returns the path that the kernel names, if the agent finds the
// very same file there. It does not when the file was deleted or replaced (the
// kernel then appends " (deleted)", which is also a legal name), and when the
// process has put its own file at that path in a mount namespace of its own
// (SECURITY.md T5).
func programPath(dir int, exe fileID) (string, error) {
	pooled := buffers.Get().(*[]byte) // on the stack it would be kept as long as the stream
	defer buffers.Put(pooled)
	buf := (*pooled)[:unix.PathMax]
	n, err := unix.Readlinkat(dir, "exe", buf)
	if err != nil {
		return "", fmt.Errorf("read the program's path: %v", err)
	}
	path := string(buf[:n])
	if n == len(buf) || !strings.HasPrefix(path, "/") {
		return "", fmt.Errorf("the kernel names the program %q, which is not an absolute path", path)
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil || !fileIDOf(&st).sameFile(exe) {
		return "", fmt.Errorf("what is now at %q is not the program that runs (deleted, replaced, or in another mount namespace)", path)
	}
	return path, nil
}

func (p *Process) note(format string, args ...any) {
	p.Notes = append(p.Notes, fmt.Sprintf(format, args...))
}
