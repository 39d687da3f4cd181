// Which systemd unit and which container a process is in, by its control group
// (SECURITY.md T5). The kernel names the group, but whoever may make groups
// below it chooses the names there: the user in his own slice, the container
// that sees its group as the root. So only the outer part of a name counts, as
// far as it was laid out by who runs the machine, and where two readings are
// possible there is none.

package workload

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Container is the container that a process is in. What could not be read
// beyond doubt is empty.
type Container struct {
	ID      string // 64 lower-case hex digits
	Runtime string // docker, containerd, cri-o or podman
	PodUID  string // of Kubernetes
	QoS     string // of the pod: guaranteed, burstable or besteffort
}

func (c Container) selectors() []string {
	var s []string
	for _, fact := range []struct{ name, value string }{
		{"container:id:", c.ID}, {"container:runtime:", c.Runtime}, {"k8s:pod-uid:", c.PodUID}, {"k8s:qos:", c.QoS},
	} {
		if fact.value != "" {
			s = append(s, fact.name+fact.value)
		}
	}
	return s
}

// readGroups finds unit and container of the process whose directory is dir, or
// notes why not. Processes outside of both are no reason for a note.
func (p *Process) readGroups(dir int) {
	var groups cgroups
	err := readAll(dir, "cgroup", func(b []byte) error {
		groups = parseCgroup(b)
		return nil
	})
	if err != nil {
		p.note("no systemd, container or k8s selectors: %v", err)
		return
	}
	if p.Unit, err = groups.unit(); err != nil {
		p.note("no systemd:unit selector: %v", err)
	}
	if p.Container, err = groups.container(); err != nil {
		p.note("no container or k8s selectors: %v", err)
	}
}

// cgroups are the groups of one process, one per hierarchy.
type cgroups []cgroup

type cgroup struct {
	controllers string // "" for version 2, "name=systemd", "pids", …
	path        string
}

// parseCgroup reads /proc/PID/cgroup: lines NUMBER:CONTROLLERS:PATH
// (cgroups(7)). The kernel escapes line breaks in names.
func parseCgroup(b []byte) cgroups {
	var groups cgroups
	for line := range bytes.Lines(b) {
		fields := strings.SplitN(strings.TrimSuffix(string(line), "\n"), ":", 3)
		if len(fields) == 3 {
			groups = append(groups, cgroup{fields[1], fields[2]})
		}
	}
	return groups
}

// components splits the path. Outside of the cgroup namespace of the agent it
// begins with "..", and the group of a process that outlived it says so: names
// then say nothing.
func (g cgroup) components() ([]string, error) {
	if g.path == "/" {
		return nil, nil
	}
	parts := strings.Split(g.path, "/")
	if parts[0] != "" || slices.Contains(parts, "..") || strings.HasSuffix(g.path, " (deleted)") {
		return nil, fmt.Errorf("its control group is %q, which is not below the agent's", g.path)
	}
	return parts[1:], nil
}

// unitName is a name of a unit with its suffix (systemd.unit(5)).
var unitName = regexp.MustCompile(`^[A-Za-z0-9:_.\\@-]{1,240}\.(service|scope|socket|mount|swap|slice)$`)

const slice = ".slice"

// unit is the system unit that the process belongs to: the first name below the
// slices. What lies below that is the unit's own affair, such as the units of a
// user's systemd, which belong to user@UID.service.
func (g cgroups) unit() (string, error) {
	i := slices.IndexFunc(g, func(c cgroup) bool { return c.controllers == "name=systemd" })
	if i < 0 {
		i = slices.IndexFunc(g, func(c cgroup) bool { return c.controllers == "" })
	}
	if i < 0 {
		return "", nil
	}
	parts, err := g[i].components()
	if err != nil {
		return "", err
	}
	for _, name := range parts {
		name = strings.TrimPrefix(name, "_") // how systemd keeps names apart from files of the kernel
		switch {
		case strings.HasSuffix(name, slice) && unitName.MatchString(name):
			continue
		case unitName.MatchString(name):
			return name, nil
		}
		return "", nil // not laid out by systemd
	}
	return "", nil
}

// container reads the groups of all hierarchies. Those that name none, such as
// the root, are passed over; the others must agree.
func (g cgroups) container() (Container, error) {
	var found Container
	for _, c := range g {
		parts, err := c.components()
		if err != nil {
			return Container{}, err
		}
		one, err := containerOf(parts)
		switch {
		case err != nil:
			return Container{}, fmt.Errorf("its control group is %q: %w", c.path, err)
		case one == (Container{}):
			continue
		case found != (Container{}) && found != one:
			return Container{}, fmt.Errorf("its control groups name two containers, %q and %q", found, one)
		}
		found = one
	}
	return found, nil
}

// Scopes and groups as the runtimes name them, by systemd (NAME-ID.scope) and
// without (NAME-ID, or ID in a folder of the runtime's).
var (
	scopeName  = regexp.MustCompile(`^([a-z-]+)-([0-9a-f]{64})(\.scope)?$`)
	bareID     = regexp.MustCompile(`^[0-9a-f]{64}$`)
	anyID      = regexp.MustCompile(`[0-9a-f]{64}`)
	podName    = regexp.MustCompile(`^pod([0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})$`)
	runtimes   = map[string]string{"docker": "docker", "cri-containerd": "containerd", "nerdctl": "containerd", "crio": "cri-o", "libpod": "podman"}
	bareParent = map[string]string{"docker": "docker", "libpod_parent": "podman", "default": "containerd", "k8s.io": "containerd"}
)

// userSlice holds groups that users make as they like.
const userSlice = "user" + slice

// errNested: a second name that could be a container's. The inner one was chosen
// within the outer one, so neither is what an operator would mean.
var errNested = errors.New("it could be of a container within a container")

// containerOf reads one path.
func containerOf(parts []string) (Container, error) {
	if len(parts) == 0 || parts[0] == userSlice {
		return Container{}, nil
	}
	c, rest, err := podOf(parts)
	if err != nil {
		return Container{}, err
	}
	inPod := c.PodUID != ""
	for len(rest) > 1 && strings.HasSuffix(rest[0], slice) {
		rest = rest[1:]
	}
	if len(rest) == 0 {
		return c, nil // the pod's own group
	}
	name := rest[0]
	scope := scopeName.FindStringSubmatch(name)
	switch {
	case scope != nil && runtimes[scope[1]] != "":
		c.Runtime, c.ID = runtimes[scope[1]], scope[2]
	case inPod && bareID.MatchString(name):
		c.ID = name
	case bareParent[name] != "" && len(rest) > 1 && !inPod:
		rest = rest[1:]
		id := strings.TrimPrefix(rest[0], "libpod-")
		if !bareID.MatchString(id) {
			return Container{}, nil
		}
		c.Runtime, c.ID = bareParent[name], id
	default:
		if inPod {
			return Container{}, errors.New("it names a pod, and no container of it")
		}
		return Container{}, nil
	}
	if slices.ContainsFunc(rest[1:], anyID.MatchString) {
		return Container{}, errNested
	}
	return c, nil
}

// podOf takes the groups of Kubernetes off the front: kubepods, the class if it
// is not guaranteed, and the pod. By systemd each name repeats those above it.
func podOf(parts []string) (c Container, rest []string, err error) {
	names, systemd := plainNames(parts)
	at := slices.Index(names, "kubepods")
	if at < 0 || at > 1 || at == 1 && names[0] != "kubelet" {
		return Container{}, parts, nil
	}
	c.QoS = "guaranteed"
	at++
	if at < len(names) && (names[at] == "burstable" || names[at] == "besteffort") {
		c.QoS = names[at]
		at++
	}
	if at == len(names) {
		return Container{}, nil, nil // of Kubernetes, and no pod
	}
	pod := podName.FindStringSubmatch(names[at])
	if pod == nil || systemd != strings.HasSuffix(parts[at], slice) {
		return Container{}, nil, fmt.Errorf("%q is not the name of a pod", parts[at])
	}
	c.PodUID = strings.ReplaceAll(pod[1], "_", "-")
	return c, parts[at+1:], nil
}

// plainNames undoes the names of nested slices, a-b-c.slice below a-b.slice
// below a.slice, as far as they go: what is left is what each adds.
func plainNames(parts []string) (names []string, systemd bool) {
	outer := ""
	for _, part := range parts {
		name, isSlice := strings.CutSuffix(part, slice)
		if !isSlice {
			names = append(names, part)
			continue
		}
		systemd = true
		own := name
		if outer != "" {
			var ok bool
			if own, ok = strings.CutPrefix(name, outer+"-"); !ok {
				own = part // not below the one above: no name that we know
			}
		}
		names, outer = append(names, own), name
	}
	return names, systemd
}
