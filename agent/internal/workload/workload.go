// Package workload proves facts about the process at the other end of a Unix
// socket: which user and groups it runs as, which program it is, and which
// systemd unit and which container it is in. Only data
// that the kernel owns counts. Whatever is ambiguous (another program at the
// path that the kernel names, a process that changed its user after it
// connected) proves nothing, because a missing selector can only take an
// identity away.
package workload

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"merlon.dev/agent/internal/kubelet"
	"merlon.dev/sdk/unixsock"
)

// ErrGone says that the process ended, or can no longer be told apart from
// another one. The answer that was being prepared must not be given.
var ErrGone = errors.New("the calling process is gone")

// ErrForeign says that the process lives in a PID namespace that the agent does
// not see, so that it has no number here.
var ErrForeign = errors.New("the calling process is in another PID namespace than the agent, and not below it")

// ErrChanged says that the process is not what it was when it connected: it runs
// another program, or changed its user or group. It has to connect again.
var ErrChanged = errors.New("the calling process runs another program, or as another user or group, than when it connected")

// Process is what was proved about one process at one moment.
type Process struct {
	PID      int32
	UID, GID uint32
	// Path is the program's absolute path, or empty when it is not beyond
	// doubt; then Notes says why.
	Path string
	// Read are the kinds of facts that were looked for, and where nothing kept
	// them from being found.
	Read Kinds
	// SHA256 is the lower-case hex digest of the program, when it was asked
	// for and could be made.
	SHA256 string
	// Groups are the supplementary groups.
	Groups []uint32
	// User and Group are the names of UID and GID on this machine, GroupNames
	// those of Groups; what has no name there is left out.
	User, Group string
	GroupNames  []string
	// Unit is the systemd unit, empty outside of any.
	Unit string
	// Container is zero outside of any.
	Container Container
	// Pod are the selectors of the pod that the container is in, by the kubelet.
	Pod []string
	// Notes says in sentences what could not be proved, for explain.
	Notes []string

	startTicks uint64 // zero for a process pinned by a pidfd
	exe        fileID // zero when the program is unknown
}

// Same says whether q shows the process p still running the same program as
// the same user and group.
func (p *Process) Same(q *Process) bool {
	return p.PID == q.PID && p.startTicks == q.startTicks && p.UID == q.UID && p.GID == q.GID &&
		p.exe.sameFile(q.exe) && p.Path == q.Path
}

// Selectors lists the proved facts as "type:value", sorted.
func (p *Process) Selectors() []string {
	s := append(p.Container.selectors(), p.Pod...)
	s = append(s, "unix:uid:"+id(p.UID), "unix:gid:"+id(p.GID))
	for _, gid := range p.Groups {
		s = append(s, "unix:supplementary_gid:"+id(gid))
	}
	for _, name := range p.GroupNames {
		s = append(s, "unix:supplementary_group:"+name)
	}
	for _, fact := range []struct{ name, value string }{
		{"systemd:unit:", p.Unit}, {"unix:group:", p.Group}, {"unix:path:", p.Path}, {digestSelector, p.SHA256}, {"unix:user:", p.User},
	} {
		if fact.value != "" {
			s = append(s, fact.name+fact.value)
		}
	}
	slices.Sort(s)
	return slices.Compact(s)
}

// Proof is what p proved, for those who compare it with entries.
func (p *Process) Proof() Proof { return Proof{Selectors: p.Selectors(), Read: p.Read} }

func id(n uint32) string { return strconv.FormatUint(uint64(n), 10) }

// Attestor reads processes from one /proc. It is safe for concurrent use.
type Attestor struct {
	// Kubelet tells whose container is whose; nil where there is none. It is set
	// before the first call.
	Kubelet *kubelet.Client

	proc   *os.File // O_PATH, procfs
	hashes hashes
	users  names
	groups names

	// afterRead is called between reading a process and the last check that
	// it still lives. Tests end processes here.
	afterRead func()
}

// New opens /proc. Close the result.
func New() (*Attestor, error) {
	fd, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("open /proc: %w", err)
	}
	proc := os.NewFile(uintptr(fd), "/proc")
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		proc.Close()
		return nil, fmt.Errorf("stat /proc: %w", err)
	}
	// Anything else mounted there could name users and programs as it likes
	// (SECURITY.md T5).
	if st.Type != unix.PROC_SUPER_MAGIC {
		proc.Close()
		return nil, errors.New("/proc is not the kernel's proc filesystem")
	}
	return &Attestor{
		proc: proc, hashes: newHashes(), afterRead: func() {},
		users: names{path: "/etc/passwd"}, groups: names{path: "/etc/group"},
	}, nil
}

// Close releases /proc and the kubelet.
func (a *Attestor) Close() error {
	if a.Kubelet != nil {
		a.Kubelet.Close()
	}
	return a.proc.Close()
}

// Attest proves what it can about peer, of the kinds in wanted. Attest returns
// ErrGone when the process ended before the end of
// the call, and ErrChanged when it is no longer the user that connected, or runs
// another program than when Meet, or else Attest, first looked at it.
//
// With a pidfd (Linux 6.5 or later) the answer is about the process that
// connected and no other: /proc/PID is opened while the pidfd shows it alive,
// everything is read below that directory, which stays with the process and
// never passes to another that gets its number, and the pidfd is asked again
// at the end (SECURITY.md T2). Before 6.5 that holds from when the connection was
// accepted (package unixsock): a process that took over the number before, with
// the same user and group, is not noticed. Before Linux 5.3 there are no pidfds,
// and only the process's start time is compared, before and after it is read.
func (a *Attestor) Attest(ctx context.Context, peer *unixsock.Peer, wanted Kinds) (*Process, error) {
	if peer.PID <= 0 {
		return nil, ErrForeign
	}
	began := a.began(peer)
	p, err := a.read(ctx, &Process{PID: peer.PID, UID: peer.UID, Read: wanted}, !peer.Pinned(), peer.Alive)
	if err != nil {
		return nil, err
	}
	// A program run by the peer, which holds the socket open elsewhere, would
	// otherwise speak for that program, or for its set-user-ID user (T3, T4).
	if p.UID != peer.UID || p.GID != peer.GID || !p.exe.sameFile(began) {
		return nil, ErrChanged
	}
	return p, nil
}

// Meet looks at the program of a process that has just connected: whatever it
// becomes later is not what its connection belongs to.
func (a *Attestor) Meet(peer *unixsock.Peer) { a.began(peer) }

// began is the program that the connection of peer belongs to; zero where it
// cannot be read.
func (a *Attestor) began(peer *unixsock.Peer) fileID {
	return peer.First(func() any {
		dir, err := a.open(peer.PID)
		if err != nil {
			return fileID{}
		}
		defer unix.Close(dir)
		exe, err := statExe(dir)
		if err != nil || !peer.Alive() {
			return fileID{}
		}
		return exe
	}).(fileID)
}

// open opens the directory of a process below /proc.
func (a *Attestor) open(pid int32) (dir int, err error) {
	return unix.Openat(int(a.proc.Fd()), fmt.Sprint(pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
}

// AttestPID proves everything that it can about the process with this number.
// It is for explanations only: the number may come to mean another
// process as soon as AttestPID returns.
func (a *Attestor) AttestPID(ctx context.Context, pid int32) (*Process, error) {
	if pid <= 0 {
		return nil, fmt.Errorf("%w: %d is not a process ID", ErrGone, pid)
	}
	fd, err := unix.PidfdOpen(int(pid), 0)
	if err != nil {
		return nil, fmt.Errorf("%w: process %d: %v", ErrGone, pid, err)
	}
	defer unix.Close(fd)
	return a.read(ctx, &Process{PID: pid, UID: uint32(os.Geteuid()), Read: AllKinds}, false, func() bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return err == nil && n == 0
	})
}

// read looks at /proc/PID between two calls of alive, both of which must say
// yes. p says which process, which kinds are wanted and, until that is read, the
// user who asks. weak says that alive can only tell that some process has the
// number.
func (a *Attestor) read(ctx context.Context, p *Process, weak bool, alive func() bool) (*Process, error) {
	dir, err := a.open(p.PID)
	if err != nil {
		return nil, fmt.Errorf("%w: process %d: %v", ErrGone, p.PID, err)
	}
	defer unix.Close(dir)
	// Alive after the directory was opened: so it is this process's.
	if !alive() {
		return nil, ErrGone
	}
	if err := a.readFacts(ctx, dir, p, weak); err != nil {
		return nil, err
	}
	if !alive() {
		return nil, ErrGone
	}
	return p, ctx.Err()
}

// readFacts reads everything about the process whose directory is dir. User and
// group are read between two looks at the program, which must agree, so that
// they belong together.
func (a *Attestor) readFacts(ctx context.Context, dir int, p *Process, weak bool) error {
	if weak {
		if err := p.readStart(dir); err != nil {
			return err
		}
	}
	a.readProgram(ctx, dir, p)
	if err := p.readIDs(dir); err != nil {
		return err
	}
	if p.Read&(ControlGroups|Pods) != 0 {
		p.readGroups(dir)
	}
	if p.Read&Pods != 0 {
		a.readPod(ctx, p)
	}
	if p.Read&Names != 0 {
		a.nameIDs(p)
	}
	a.afterRead()
	if p.exe != (fileID{}) {
		if id, err := statExe(dir); err != nil || !id.sameFile(p.exe) {
			return fmt.Errorf("%w: it started another program meanwhile", ErrGone)
		}
	}
	if !weak {
		return nil
	}
	again := Process{}
	if err := again.readStart(dir); err != nil || again.startTicks != p.startTicks {
		return fmt.Errorf("%w: another process has its number now", ErrGone)
	}
	return nil
}

// readPod asks the kubelet about the process's container, which the kernel named.
// While the kubelet does not answer nothing is known of the pod, which is not the
// same as that it has no selectors.
func (a *Attestor) readPod(ctx context.Context, p *Process) {
	if p.Container.PodUID == "" {
		return
	}
	if a.Kubelet == nil {
		p.note("no selectors of the pod but k8s:pod-uid and k8s:qos: the agent has no kubelet_address")
		return
	}
	c, err := a.Kubelet.Container(ctx, p.Container.PodUID, p.Container.ID)
	if err != nil {
		p.note("no selectors of the pod but k8s:pod-uid and k8s:qos: %v", err)
		if !errors.Is(err, kubelet.ErrNotListed) {
			p.Read &^= Pods
		}
	}
	p.Pod = c.Selectors
}

// nameIDs looks up what is called how on this machine.
func (a *Attestor) nameIDs(p *Process) {
	var err error
	if p.User, err = a.users.of(p.UID); err != nil && !errors.Is(err, errUnnamed) {
		p.note("no unix:user selector: %v", err)
	}
	if p.Group, err = a.groups.of(p.GID); err != nil && !errors.Is(err, errUnnamed) {
		p.note("no unix:group selector: %v", err)
	}
	for _, gid := range p.Groups {
		if name, err := a.groups.of(gid); err == nil {
			p.GroupNames = append(p.GroupNames, name)
		}
	}
}

// buffers holds read buffers for files in /proc. Most are a few KiB; a process
// can have 65536 groups.
var buffers = sync.Pool{New: func() any { return new(make([]byte, 0, 8<<10)) }}

const maxProcBytes = 1 << 20
