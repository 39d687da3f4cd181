// Kinds of nodes whose names an attestor makes, and what such an attestor can
// prove of a node.

package entry

// nodeKinds lists, by kind of evidence, the selectors that it can give a node.
// The kind is also the first segment of the names of its agents.
var nodeKinds = map[string]map[string]func(string) string{
	"x509pop": {
		"subject-cn":    nodeFact,
		"dns":           nodeFact,
		"key-sha256":    sha256Hex,
		"ca-key-sha256": sha256Hex,
	},
	"k8s": {
		"cluster":         nodeFact,
		"node-name":       nodeFact,
		"node-uid":        podUID,
		"namespace":       nodeFact,
		"service-account": nodeFact,
		"pod-name":        nodeFact,
		"pod-uid":         podUID,
	},
	"gcp": {
		"project":         nodeFact,
		"zone":            nodeFact,
		"instance-id":     nodeFact,
		"instance-name":   nodeFact,
		"service-account": nodeFact,
	},
	"azure": {
		"tenant":         nodeFact,
		"subscription":   nodeFact,
		"resource-group": nodeFact,
		"vm-name":        nodeFact,
	},
	"aws": {
		"account":       nodeFact,
		"region":        nodeFact,
		"zone":          nodeFact,
		"instance-id":   nodeFact,
		"instance-type": nodeFact,
		"image-id":      nodeFact,
	},
}

// CheckNodeSelector says why sel cannot be a fact about a node, as an
// *InvalidError.
func CheckNodeSelector(sel Selector) error {
	if err := checkAgainst(nodeKinds, sel); err != nil {
		return err
	}
	return nil
}

// nodeFact is what evidence says in words of its own.
func nodeFact(s string) string {
	if s == "" || len(s) > maxFactBytes || !printableASCII(s) {
		return "want 1 to 256 printable ASCII characters"
	}
	return ""
}

const maxFactBytes = 256

func printableASCII(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}
