// Selectors of Kubernetes: as the kubelet can name things, and nothing else.

package entry

import (
	"strings"
	"testing"
)

func TestSelectorsOfKubernetes(t *testing.T) {
	for selector, ok := range map[string]bool{
		"k8s:ns:shop": true, "k8s:ns:Shop": false, "k8s:ns:shop.": false, "k8s:ns:": false, "k8s:ns:a.b": false,
		"k8s:ns:" + strings.Repeat("a", 63): true, "k8s:ns:" + strings.Repeat("a", 64): false,
		"k8s:sa:default": true, "k8s:sa:my.account": true, "k8s:sa:-x": false, "k8s:sa:a..b": false,
		"k8s:pod-name:web-5d9c7b9f6d-abcde": true, "k8s:pod-name:web/0": false,
		"k8s:pod-name:" + strings.Repeat("a", 254): false,
		"k8s:pod-label:app:web":                    true, "k8s:pod-label:app.kubernetes.io/name:web": true, "k8s:pod-label:gpu:": true,
		"k8s:pod-label:app": false, "k8s:pod-label::web": false, "k8s:pod-label:app:a b": false, "k8s:pod-label:A/b/c:d": false,
		"k8s:pod-label:/name:x": false, "k8s:pod-label:app:web:1": false,
		"k8s:pod-owner:StatefulSet:db": true, "k8s:pod-owner:db": false, "k8s:pod-owner::db": false, "k8s:pod-owner:Set:Db": false,
		"k8s:node-name:node-1.example.org": true, "k8s:container-name:web": true, "k8s:container-name:Web": false,
		"k8s:container-image:registry.example.org:5000/shop/web:1.4.2": true,
		"k8s:container-image:web@sha256:" + strings.Repeat("ab", 32):   true,
		"k8s:container-image:web 1":                                    false, "k8s:container-image:": false,
		"k8s:namespace:shop": false,
	} {
		got, err := ParseSelector(selector)
		if (err == nil) != ok || ok && got.String() != selector {
			t.Errorf("ParseSelector(%.80q) = %q, %v; want ok %t", selector, got, err, ok)
		}
	}
}
