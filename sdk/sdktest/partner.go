// A second trust domain, for programs that call or serve others' workloads.

package sdktest

import "slices"

// Partner makes another trust domain of this name, such as "partner.test", that
// federates with td: the workloads of each have the other's trust bundle. Policy,
// revocations and roots are its own. It lasts as long as the test.
//
//	partner := td.Partner("partner.test")
//	td.Allow(partner.ID("web").String(), "orders")
func (td *TD) Partner(name string) *TD {
	td.t.Helper()
	other := newTD(td.t, name, td.memory)
	td.Trust(other)
	other.Trust(td)
	return other
}

// Distrust takes the trust bundle of other away from td's workloads, as `merlon
// federation remove` does. It changes nothing for those of other.
func (td *TD) Distrust(other *TD) {
	td.change(func() { td.partners = slices.DeleteFunc(td.partners, func(p *TD) bool { return p == other }) })
}

// Trust gives td's workloads the trust bundle of other, and every later one, also
// after Distrust.
func (td *TD) Trust(other *TD) {
	other.mu.Lock()
	if !slices.Contains(other.trustees, td) {
		other.trustees = append(other.trustees, td)
	}
	other.mu.Unlock()
	td.change(func() {
		if !slices.Contains(td.partners, other) {
			td.partners = append(td.partners, other)
		}
	})
}

// federated are the trust bundles of the partners, as the Workload API has them, and
// what is closed when there may be others.
func (td *TD) federated() (map[string][]byte, <-chan struct{}) {
	td.mu.Lock()
	partners, changed := slices.Clone(td.partners), td.changed
	td.mu.Unlock()
	all := make(map[string][]byte)
	for _, other := range partners {
		for _, root := range other.Bundle().X509Authorities() {
			id := "spiffe://" + other.name
			all[id] = append(all[id], root.Raw...)
		}
	}
	return all, changed
}
