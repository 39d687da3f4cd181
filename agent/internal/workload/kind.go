// Kinds of selectors. Proving some facts costs a file to read or somebody to
// ask, so they are looked for only where an entry of the node asks for one.

package workload

import "strings"

// Kinds is a set of kinds of selectors.
type Kinds uint8

// The kinds that cost something. User, groups and path of a process are of none
// of them: they are always proved.
const (
	// Digest is of unix:sha256.
	Digest Kinds = 1 << iota
	// Names is of unix:user, unix:group and unix:supplementary_group.
	Names
	// ControlGroups is of systemd:unit, container:…, k8s:pod-uid and k8s:qos.
	ControlGroups
	// Pods is of every other k8s:…, which the kubelet knows.
	Pods

	// AllKinds is every kind.
	AllKinds Kinds = 1<<iota - 1
)

// digestSelector begins every selector of kind Digest.
const digestSelector = "unix:sha256:"

// byPrefix says of what kind a selector is, the first that fits; one that begins
// with none of them is always proved, or never.
var byPrefix = []struct {
	prefix string
	kind   Kinds
}{
	{digestSelector, Digest},
	{"unix:user:", Names},
	{"unix:group:", Names},
	{"unix:supplementary_group:", Names},
	{"systemd:", ControlGroups},
	{"container:", ControlGroups},
	{"k8s:pod-uid:", ControlGroups},
	{"k8s:qos:", ControlGroups},
	{"k8s:", Pods},
}

// KindOf returns the kind of a selector ("type:value"), or zero.
func KindOf(selector string) Kinds {
	for _, p := range byPrefix {
		if strings.HasPrefix(selector, p.prefix) {
			return p.kind
		}
	}
	return 0
}

// Proof is what a process proved, and what it was asked for.
type Proof struct {
	// Selectors are "type:value", sorted.
	Selectors []string
	// Read are the kinds that were looked for. That a selector of another kind
	// is not among Selectors means nothing.
	Read Kinds
}
