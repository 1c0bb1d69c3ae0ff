// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"reflect"
	"testing"

	"github.com/stretchr/testify/require"
)

// Whatever changes, be it in a field that was added since, Equal sees it.
func TestIntentsEqual(t *testing.T) {
	filled := func() Intents {
		var in Intents
		fill(reflect.ValueOf(&in).Elem(), 1)
		return in
	}
	in := filled()
	require.True(t, in.Equal(filled()))
	n := 0
	eachValue(reflect.ValueOf(&in).Elem(), "Intents", func(v reflect.Value, path string) {
		was := reflect.New(v.Type()).Elem()
		was.Set(v)
		fill(v, 2)
		require.NotEqual(t, filled(), in, path)
		require.False(t, in.Equal(filled()), path)
		v.Set(was)
		n++
	})
	require.True(t, in.Equal(filled()))
	require.Greater(t, n, 60)
}

// fill sets a value to one that the seed tells.
func fill(v reflect.Value, seed byte) {
	switch v.Interface().(type) {
	case netip.Addr:
		v.Set(reflect.ValueOf(netip.AddrFrom4([4]byte{192, 0, 2, seed})))
		return
	case netip.AddrPort:
		v.Set(reflect.ValueOf(netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, seed}), 80)))
		return
	case netip.Prefix:
		v.Set(reflect.ValueOf(netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, seed}), 32)))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i), seed)
		}
	case reflect.Array:
		for i := range v.Len() {
			fill(v.Index(i), seed)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0), seed)
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		fill(key, seed)
		fill(value, seed)
		v.SetMapIndex(key, value)
	case reflect.String:
		v.SetString(string('a' + rune(seed)))
	case reflect.Bool:
		v.SetBool(seed == 1)
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(seed))
	case reflect.Uint8, reflect.Uint16, reflect.Uint32:
		v.SetUint(uint64(seed))
	default:
		panic("a kind that is not known: " + v.Kind().String())
	}
}

// eachValue calls f for every value that can be set on its own.
func eachValue(v reflect.Value, path string, f func(reflect.Value, string)) {
	switch v.Interface().(type) {
	case netip.Addr, netip.AddrPort, netip.Prefix:
		f(v, path)
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			eachValue(v.Field(i), path+"."+v.Type().Field(i).Name, f)
		}
	case reflect.Slice:
		eachValue(v.Index(0), path, f)
	default:
		f(v, path)
	}
}
